"""One task on the page: scores, where the change comes from, charts, parts and all metrics."""

from __future__ import annotations

from collections.abc import Sequence

from evals.report import charts, svg, words
from evals.report.html_questions import moved
from evals.report.pieces import anchor, chip, ends, key, labels, line_of, notes, number, ranged, row, table
from evals.report.svg import element, escape
from evals.result import Paired, Result, Scores, TaskResult, Versus

CONTROL = "grammar alone"
"""The base under the task's grammar: what a constrained decoder gives without training."""
SPAN = svg.Span(0.0, 1.0)


def section(result: Result, task: TaskResult) -> str:
    """Everything about one task."""
    names = [subject.name for subject in result.subjects]
    place = anchor(task)
    parts = [
        element("h2", escape(task.title), labels(task), id=place),
        element("p", escape(words.facts(task)), kind="note"),
        element("p", escape(words.protocol(task)), kind="note"),
        _headline(task, names),
        element("p", escape((words.grammar(task) or "").replace("-", "−"))) if task.control else "",
        *(_versus(task, versus) for versus in task.versus),
        notes(task.notes),
        _charts(task, names),
        _parts(task, names),
        _metrics(task, names),
        *(moved(task, names, names.index(versus.candidate)) for versus in task.versus),
    ]
    return element("section", *(part for part in parts if part), aria_labelledby=place)


def _headline(task: TaskResult, names: Sequence[str]) -> str:
    lines = []
    shown = [(name, scores, svg.colour(i)) for i, (name, scores) in enumerate(zip(names, task.scores, strict=True))]
    if task.control is not None:
        shown.append((f"{names[0]}, {CONTROL}", task.control, "control"))
    for name, scores, kind in shown:
        found = scores.metrics[task.headline]
        whole = words.estimate(found)
        label = f"{name}: {task.headline} {whole}"
        plot = svg.interval_row(label, found.mean, found.low, found.high, SPAN, kind)
        lines.append(row(name, plot, words.percent(found.mean), whole))
    heading = element("h3", element("code", escape(task.headline)), ", mean with 95% interval")
    doc = element("p", escape(task.metrics[task.headline]), kind="note") if task.headline in task.metrics else ""
    return heading + doc + element("div", *lines, ends("0%", "50%", "100%"), kind="rows")


def _versus(task: TaskResult, versus: Versus) -> str:
    """A candidate's difference in a sentence, and its split into format and content."""
    paired = versus.metrics[task.headline]
    found = paired.comparison
    fixed = ""
    if paired.fixed is not None:
        low, high = (words.points(value).replace("-", "−") for value in paired.fixed)
        fixed = f" On these very questions (sampling noise only): [{low}, {high}]."
    sentence = (
        f": {words.change(found).replace('-', '−')} points, {words.p_text(found.p)}"
        f"{'' if paired.p_holm is None else f', after Holm {words.p_text(paired.p_holm)}'}; {words.count(found.n, 'question')}: {found.wins:,} up, "
        f"{found.losses:,} down, {found.ties:,} equal; could have seen {words.detectable(found)} points.{fixed}"
    )
    heading = element("h3", escape(versus.candidate), ": ", chip(paired.verdict))
    text = element("p", f"Difference to the base{escape(sentence)}")
    return heading + text + (_split(versus) if versus.split else "")


def _split(versus: Versus) -> str:
    split = versus.split
    assert split is not None
    total = split.from_format + split.from_content
    sides = []
    for name, (form, content) in (("base", split.base), ("candidate", split.candidate)):
        sides.append(f"{name}: format {words.percent(form)}, content given format {words.percent(content)}")
    label = f"Change of {words.points(total)} points: format {words.points(split.from_format)}, content {words.points(split.from_content)}"
    swatches = [
        element("span", f"{part} {words.points(value)}".replace("-", "−"), kind=f"box {part}")
        for part, value in (("format", split.from_format), ("content", split.from_content))
    ]
    bar = svg.split_bar(label, split.from_format, split.from_content)
    line = line_of("change, in points", bar, " ".join(swatches))
    return element("p", escape(split.words)) + line + element("p", escape("; ".join(sides)), kind="note")


def _charts(task: TaskResult, names: Sequence[str]) -> str:
    figures = []
    base = [question.scores[0] for question in task.questions]
    for versus in task.versus:
        index = names.index(versus.candidate)
        if not base:
            continue
        heading = f"Each question, {versus.candidate}" if len(task.versus) > 1 else "Each question"
        chart = charts.scatter(base, [q.scores[index] for q in task.questions], (names[0], versus.candidate))
        figures.append(_figure(heading, chart, "Above the diagonal: better than the base. Area: number of questions."))
    found = [(i, names[i], s.pass_at) for i, s in enumerate(task.scores) if s.pass_at is not None]
    if found and task.samples > 1:
        chart = charts.curves(found, task.samples)
        figures.append(_figure("pass@k", chart, "At k = K this is “any reply right”: a maximum. Bands: 95%."))
    chosen = [(i, names[i], curve) for i, curve in enumerate(task.best_of) if curve is not None]
    if chosen:
        chart = charts.curves(chosen, task.samples, "best of k")
        figures.append(
            _figure("Best of k by the judge", chart, "The reply with the highest score among k. Bands: 95%.")
        )
    if any(scores.lengths for scores in task.scores):
        chart = charts.lengths([(name, s.lengths) for name, s in zip(names, task.scores, strict=True)])
        cuts = ", ".join(f"{name} {words.percent(s.truncated)}" for name, s in zip(names, task.scores, strict=True))
        figures.append(_figure("Length of replies", chart, f"Cut at the token limit: {cuts}."))
    return key(list(enumerate(names))) + element("div", *figures, kind="charts") if figures else ""


def _figure(heading: str, chart: str, caption: str) -> str:
    return element("figure", element("h4", escape(heading)), chart, element("figcaption", escape(caption)))


def _parts(task: TaskResult, names: Sequence[str]) -> str:
    blocks = []
    for heading, parts in task.parts.items():
        lines = []
        for part in parts:
            first = words.percent(part.means[0])
            rest = "".join(f" → {words.percent(mean)}" for mean in part.means[1:])
            label = f"{heading} {part.name}: " + ", ".join(
                f"{name} {words.percent(mean)}" for name, mean in zip(names, part.means, strict=True)
            )
            lines.append(
                row(f"{part.name} ({part.questions:,})", svg.dots_row(label, part.means, SPAN), first, first + rest)
            )
        if lines:
            body = element("div", *lines, ends("0%", "50%", "100%"), kind="rows")
            blocks.append(element("h3", escape(f"By {heading} (questions)")) + body)
    return "".join(blocks)


def _columns(task: TaskResult) -> list[Scores]:
    return [*task.scores, *([task.control] if task.control else [])]


def _metrics(task: TaskResult, names: Sequence[str]) -> str:
    head = ["Metric", *names, *([f"{names[0]}, {CONTROL}"] if task.control else [])]
    for versus in task.versus:
        of = f", {versus.candidate}" if len(task.versus) > 1 else ""
        head += [f"Difference{of}", f"p{of}", f"Verdict{of}"]
    body = [_metric_row(task, name) for name in task.scores[0].metrics]
    blank = [number(""), number(""), ""] * len(task.versus)
    for label, values in _other_rows(task):
        body.append([escape(label), *(number(value) for value in values), *blank])
    note = element("p", "p values here are not adjusted: only headlines are tested together.", kind="note")
    inside = element("div", table(f"All metrics of {task.title}", head, body), note if task.versus else "")
    return element("details", element("summary", "All metrics"), inside, kind="metrics")


def _metric_row(task: TaskResult, name: str) -> list[str]:
    mark = " (headline)" if name == task.headline else ""
    doc = element("span", escape(task.metrics[name]), kind="note") if name in task.metrics else ""
    cells = [element("code", escape(name)) + mark + doc]
    for scores in _columns(task):
        found = scores.metrics.get(name)
        cells.append(ranged(words.percent(found.mean), words.estimate(found)) if found else number(words.NONE))
    for versus in task.versus:
        cells += _difference(versus.metrics[name]) if name in versus.metrics else [number(""), number(""), ""]
    return cells


def _difference(paired: Paired) -> list[str]:
    found = paired.comparison
    value = ranged(words.points(found.difference), words.change(found))
    return [value, number(words.p_value(found.p)), chip(paired.verdict)]


def _other_rows(task: TaskResult) -> list[tuple[str, list[str]]]:
    """What is known of the replies beside the metrics; rows that no subject has are left out."""
    columns = _columns(task)
    rows = [
        (f"maj@{task.samples}", [words.estimate(scores.majority) for scores in columns]),
        ("no answer", [words.percent(scores.no_answer) for scores in columns]),
        ("cut at the token limit", [words.percent(scores.truncated) for scores in columns]),
        ("mean tokens", [words.tokens(words.mean_length(scores)) for scores in columns]),
        ("mean tokens, right replies", [words.tokens(scores.tokens_right) for scores in columns]),
        ("mean tokens, wrong replies", [words.tokens(scores.tokens_wrong) for scores in columns]),
    ]
    return [(label, values) for label, values in rows if any(value != words.NONE for value in values)]
