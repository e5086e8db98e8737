"""Avalanche's strategies."""

from time import process_time

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import EWC, SynapticIntelligence
from torch.utils.data import TensorDataset

from setting import BATCH, EPOCHS, LR, report, setting


def dataset(x, y):
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


name, strength, _, model, tasks = setting()
benchmark = benchmark_from_datasets(
    train=[dataset(*train) for train, _ in tasks], test=[dataset(*test) for _, test in tasks]
)
kind, option = {"ewc": (EWC, "ewc_lambda"), "si": (SynapticIntelligence, "si_lambda")}[name]
strategy = kind(
    model=model,
    optimizer=torch.optim.Adam(model.parameters(), lr=LR),
    criterion=torch.nn.CrossEntropyLoss(),
    train_mb_size=BATCH,
    train_epochs=EPOCHS,
    evaluator=EvaluationPlugin(accuracy_metrics(experience=True)),
    **{option: strength},
)
start = process_time()
for experience in benchmark.train_stream:
    strategy.train(experience)
seconds = process_time() - start

report(seconds, [*strategy.eval(benchmark.test_stream).values()])
