"""What `loss` is given: moved to clext.core.batches."""

from clext.core.batches import added_logits as added_logits
from clext.core.batches import check_examples as check_examples_of_task
from clext.core.batches import checked_batch as checked_batch
from clext.core.batches import labelled as labelled

__all__ = ["added_logits", "check_examples_of_task", "checked_batch", "labelled"]
