"""Tables of time, traffic and sizes."""

from __future__ import annotations

from statistics import fmean, median

from report.result_tables import (
    NOT_MEASURED,
    Entry,
    by_device,
    markdown,
    newest,
    read_lines,
    times,
    where,
)

NAMES = {"torch": "plain torch"}
CONTESTANTS = ("clext", "course")
MODEL_NAMES = {"mlp": "course MLP, 1.5 M", "resnet18": "ResNet-18, 11.7 M", "vit_b": "ViT-B, 86 M"}


def penalty_table() -> str:
    entries = newest(read_lines("ops"), "op", "model")
    head = [
        "model",
        "clext, ms",
        "autograd loop",
        "`torch._foreach`",
        "`torch.compile`",
        "of a copy",
    ]

    def row(e: Entry) -> list[str]:
        return [
            MODEL_NAMES[e["model"]],
            f"{e['ms']['clext']:.2f}",
            *(times(e["ratio"][name]) for name in ("loop", "foreach", "compile")),
            f"{1 / e['share_of_copy_bandwidth']:.2f}x",
        ]

    chosen = [e for e in entries if e["op"] == "add_quadratic_penalty_grad_"]
    return by_device(chosen, head, row)


def traffic_table() -> str:
    """From the definitions of the benchmarks, not from results."""
    from speed.cases import CASES
    from speed.steppers import CLEXT_OPTIMIZERS, METHOD_LISTS, least_traffic

    counts = {f"`{op}`": (case.reads, case.writes) for op, case in CASES.items()}
    for optimizer in CLEXT_OPTIMIZERS:
        for method in METHOD_LISTS:
            counts[step_name(optimizer, method)] = least_traffic(optimizer, method)
    rows = [
        [name, str(reads), str(writes), str(4 * (reads + writes))]
        for name, (reads, writes) in counts.items()
    ]
    return markdown(["op", "read", "written", "bytes/element"], rows)


def step_name(optimizer: str, method: str) -> str:
    return f"`{optimizer}_step_`" + ("" if method == "none" else f", {method}")


def ops_table() -> str:
    head = [
        "op",
        "model",
        "bytes/element",
        "ms",
        "GB/s",
        "of copy bandwidth",
        "loop",
        "foreach",
        "compile",
    ]

    def row(e: Entry) -> list[str]:
        return [
            f"`{e['op']}`",
            e["model"],
            f"{e['bytes'] / e['elements']:.0f}",
            f"{e['ms']['clext']:.3f}",
            f"{e['gb_per_s']:.0f}",
            f"{100 * e['share_of_copy_bandwidth']:.0f}%",
            *(times(e["ratio"].get(name)) for name in ("loop", "foreach", "compile")),
        ]

    return by_device(newest(read_lines("ops"), "op", "model"), head, row)


def projection_table() -> str:
    """GEM's passes as multiples of the time to read what they read once."""
    names = ("gram", "mm", "project", "project, no conflict", "mv", "host")
    head = [
        "model",
        "tasks",
        "MB",
        "read once, ms",
        "`gradient_gram`",
        "`torch.mm`",
        "`project_gradient_`",
        "no conflict",
        "`torch.mv`",
        "numpy on the host",
    ]

    def row(e: Entry) -> list[str]:
        return [
            MODEL_NAMES[e["model"]],
            str(e["tasks"]),
            f"{e['bytes'] / 1e6:.0f}",
            f"{e['ms']['read']:.2f}",
            *(times(e["ratio"][name], 2) for name in names),
        ]

    return by_device(newest(read_lines("projection"), "model", "tasks"), head, row)


def fused_table() -> str:
    """The README's part of the table `optim`: Adam with SI."""
    entries = newest(read_lines("optim"), "optimizer", "method", "model")
    head = ["model", "clext, ms", "separate passes", "course loops", "of a copy"]

    def row(e: Entry) -> list[str]:
        return [
            MODEL_NAMES[e["model"]],
            f"{e['ms']['fused']:.2f}",
            times(e["ratio"]["separate"]),
            times(e["ratio"]["course"]),
            f"{1 / e['share_of_copy_bandwidth']:.2f}x",
        ]

    chosen = [e for e in entries if (e["optimizer"], e["method"]) == ("adam", "si")]
    return by_device(chosen, head, row)


def optim_table() -> str:
    head = [
        "step",
        "model",
        "bytes/element",
        "ms",
        "of copy bandwidth",
        "separate passes",
        "course loops",
    ]

    def row(e: Entry) -> list[str]:
        return [
            step_name(e["optimizer"], e["method"]),
            e["model"],
            f"{e['bytes'] / e['elements']:.0f}",
            f"{e['ms']['fused']:.3f}",
            f"{100 * e['share_of_copy_bandwidth']:.0f}%",
            times(e["ratio"]["separate"], 2),
            times(e["ratio"]["course"]),
        ]

    return by_device(newest(read_lines("optim"), "optimizer", "method", "model"), head, row)


def state_dtype_table() -> str:
    head = ["op", "model", "bytes/element", "ms", "of copy bandwidth", "float32 / bfloat16"]

    def row(e: Entry) -> list[str]:
        optimizer, _, method = e["case"].partition(" ")
        both = [
            " and ".join(f"{scale * value:{form}}{unit}" for value in e[key].values())
            for key, scale, form, unit in (
                ("bytes_per_element", 1, "", ""),
                ("ms", 1, ".3f", ""),
                ("share_of_copy_bandwidth", 100, ".0f", "%"),
            )
        ]
        name = step_name(optimizer, method) if method else f"`{optimizer}`"
        return [name, e["model"], *both, times(e["ratio"], 2)]

    return by_device(newest(read_lines("state_dtype"), "case", "model"), head, row)


def protocol_table() -> str:
    head = [
        "method",
        "tasks x epochs",
        "precision",
        "clext, s",
        "course loop, s",
        "faster",
        "accuracy",
        "of the course loop",
    ]

    def row(e: Entry) -> list[str]:
        course = e["seconds"].get("course")
        return [
            f"`{e['method']}`",
            f"{e['tasks']} x {e['epochs']}",
            e["precision"],
            f"{e['seconds']['clext']:.1f}",
            "" if course is None else f"{course:.1f}",
            times(e["ratio"]),
            *("" if not a else f"{fmean(a):.4f}" for a in map(e["accuracy"].get, CONTESTANTS)),
        ]

    keys = ("method", "tasks", "epochs", "precision")
    return by_device(newest(read_lines("protocol"), *keys), head, row)


def step_table() -> str:
    """A line for each method, the precisions side by side; one table for each device."""
    runs = newest(({"precision": "fp32", **e} for e in read_lines("step")), "model", "precision")
    devices: dict[str, list[Entry]] = {}
    for e in runs:
        devices.setdefault(e["machine"]["device"], []).append(e)
    parts = []
    for entries in devices.values():
        head = ["method"]
        rows = {name: [NAMES.get(name, f"`{name}`")] for e in entries for name in e["ms"]}
        for e in entries:
            head += [f"{e['precision']}, ms a step", "of baseline"]
            for name, cells in rows.items():
                measured = name in e["ms"]
                cells.append(f"{e['ms'][name]:.2f}" if measured else "")
                cells.append(times(e["against_baseline"].get(name), 2))
        parts.append(markdown(head, list(rows.values())) + "\n\n" + where(entries))
    return "\n\n".join(parts) or NOT_MEASURED


def rehearsal_table() -> str:
    """A line for each contestant of a run."""
    runs = newest(read_lines("rehearsal"), "model", "precision")
    lines = [{**e, "name": name} for e in runs for name in e["ms"]]

    def row(e: Entry) -> list[str]:
        return [
            e["name"],
            e["precision"],
            f"{e['ms'][e['name']]:.2f}",
            times(e["against_baseline"][e["name"]], 2),
            times(e["against_hand"].get(e["name"]), 2),
            times(e.get("against_larger", {}).get(e["name"]), 2),
        ]

    head = ["loss", "precision", "ms a step", "of baseline", "of the same by hand"]
    head += ["of a step with as large a batch"]
    return by_device(lines, head, row)


def kfac_table() -> str:
    """Factors and pull of KFAC, by model and tasks kept."""
    runs = newest(read_lines("kfac"), "model", "part", "tasks")

    def row(e: Entry) -> list[str]:
        tasks = "" if e["tasks"] is None else f", {e['tasks']} tasks"
        return [
            f"{e['part']}{tasks}",
            e["model"],
            f"{e['ms']['clext']:.2f}",
            times(e["against_backward"]["clext"], 2),
            times(e["against_floor"], 2),
            times(e["against_backward"].get("curvlinops"), 2),
        ]

    head = ["of `KFAC`", "model", "ms", "of forward and backward", "of the floor"]
    return by_device(runs, [*head, "CurvLinOps, of forward and backward"], row)


def frameworks_table() -> str:
    head = [
        "framework",
        "lines of glue",
        "parameters differ from the loop by hand by",
        "a step without EWC, ms",
        "with EWC, ms",
    ]

    def row(e: Entry) -> list[str]:
        return [
            e["framework"],
            str(len(e["glue"])),
            "0" if e["difference"] == 0 else f"{e['difference']:.0e}",
            f"{e['ms']['without']:.2f}",
            f"{e['ms']['with']:.2f}",
        ]

    return by_device(newest(read_lines("frameworks"), "framework"), head, row)


OTHERS = {
    "by_hand": "by hand, plain PyTorch",
    "with_clext_loop": "clext, a loop of one's own",
    "with_clext_train": "`clext.train`",
    "with_avalanche": "Avalanche",
    "course_notebook": "the course's notebook",
    "mammoth": "Mammoth",
}


def others_table() -> str:
    """A line for each contestant: means over the seeds of accuracies, medians of seconds."""
    entries = newest(read_lines("others"), "contestant", "method", "seed")
    head = ["", "lines"]
    for method in ("EWC", "SI"):
        head += [f"{method}: accuracy", "training, s", "whole process, s"]

    def cells(name: str, method: str) -> list[str]:
        runs = [e for e in entries if (e["contestant"], e["method"]) == (name, method)]
        if not runs:
            return ["", "", ""]
        training = [e["training"] for e in runs if e["training"] is not None]
        return [
            f"{fmean(e['accuracy'] for e in runs):.3f}",
            f"{median(training):.1f}" if training else "",
            f"{median(e['process'] for e in runs):.1f}",
        ]

    def row(name: str, title: str) -> list[str]:
        lines = next((e["lines"] for e in entries if e["contestant"] == name), None)
        return [title, "" if lines is None else str(lines), *cells(name, "ewc"), *cells(name, "si")]

    rows = [row(name, title) for name, title in OTHERS.items()]
    return markdown(head, rows) + "\n\n" + where(entries) if entries else NOT_MEASURED


def communication_table() -> str:
    """Calls and bytes of collectives on one process."""

    def cells(counts: Entry) -> list[str]:
        return [f"{counts['calls']:g}", f"{counts['bytes']:,.0f}"]

    def row(e: Entry) -> list[str]:
        return [e["way"], e["training"], *cells(e["without"]), *cells(e["step"]), *cells(e["end"])]

    places = ["a step without a method", "with it", "end of a task"]
    head = ["model on", "training"]
    head += [entry for place in places for entry in (f"{place}: calls", "bytes")]
    return by_device(newest(read_lines("communication"), "way", "training"), head, row)


def importance_table() -> str:
    """Everything as a multiple of a plain forward and backward pass over the same data."""
    others = ["vmap", "loop", "backpack", "curvlinops product", "100 backward passes"]

    def row(e: Entry) -> list[str]:
        ratios = e["against_backward"]
        return [
            e["model"],
            e["estimate"],
            f"{e['ms']['backward']:.0f}",
            *(times(ratios.get(name), 2) for name in ("clext", "first batch", "later batches")),
            *(times(ratios.get(name)) for name in others),
        ]

    timed = ["clext", "of these the first batch", "a later batch"]
    head = ["model", "estimate", "forward + backward, ms", *timed, *others]
    return by_device(newest(read_lines("importance"), "model", "estimate"), head, row)


def course_sizes_table() -> str:
    def row(e: Entry) -> list[str]:
        course, paper = e["mean"]["course"], e["mean"]["paper"]
        return [f"`{e['method']}`", f"{course:.2g}", f"{paper:.2g}", f"{paper / course:.1f}"]

    head = ["class", "mean importance, course", "paper", "times smaller"]
    return by_device(newest(read_lines("course_sizes"), "method"), head, row)


def course_step_table() -> str:
    return by_device(
        newest(read_lines("course_step"), "method"),
        ["class", "notebook, ms", "clext.course, ms", "faster"],
        lambda e: [
            f"`{e['method']}`",
            *(f"{e['ms'][name]:.2f}" for name in ("notebook", "clext")),
            times(e["ratio"]),
        ],
    )


def plan_table() -> str:
    return by_device(
        newest(read_lines("plan"), "tensors"),
        ["tensors", "ParameterPlan, us", "dispatcher op, us"],
        lambda e: [str(e["tensors"]), f"{e['us']['plan']:.1f}", f"{e['us']['op']:.1f}"],
    )
