"""`clext.train`, which tests after each epoch too; its own timings are by the clock."""

from time import process_time

import clext
from setting import BATCH, EPOCHS, LR, report, setting

method, strength, seed, model, tasks = setting()
start = process_time()
result = clext.train(
    method,
    strength=strength,
    scenario=clext.Scenario.from_datasets(tasks),
    model=model,
    epochs=EPOCHS,
    batch_size=BATCH,
    lr=LR,
    keep_optimizer=True,
    seed=seed,
    progress=False,
)
report(process_time() - start, result.accuracy[-1].tolist())
