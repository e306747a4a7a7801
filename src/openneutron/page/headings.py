"""The headings of the page's sections: sentences with the section's result."""

from __future__ import annotations

from collections.abc import Mapping

from openneutron.page.content import AnalysisRows, Memory, ProfileRows, Summary
from openneutron.page.units import bytes_text, count_of, decibels_text, measure_text, number_text, percent_text
from openneutron.report.regions import BoardFit

__all__ = [
    "accuracy_heading", "analysis_heading", "board_heading", "changed_heading", "cycles_heading", "differences_heading",
    "errors_cancel", "layers_heading", "memory_heading", "option_facts", "placement_heading", "profile_heading",
    "recipe_facts", "resident_label", "validation_heading",
]  # fmt: skip

SMALLEST_DECIBELS = 0.1
"""The smallest difference of two SQNRs that their texts show."""
WEIGHTS_OF_TWO_LAYERS = "weights of two layers"
"""The label of memory that holds the weights of an operator and of the next one, if weights stay in flash."""


_RECIPE_FACTS = {
    "correction": (
        "correction",
        {"weights": "weights are rounded by GPTQ, and biases corrected", "biases": "biases are corrected"},
    ),
    "range_by": ("ranges of activations", {"none": "selected by the observer"}),
    "equalizes": ("channels are equalized", {}),
    "trusts_samples": ("channels that are inactive on the samples are zeroed", {}),
    "use_all_samples": ("samples of the correction", {"yes": "all", "no": "at most 50"}),
    "trains_recurrent_layers": ("recurrent layers, if any, are trained", {}),
}
"""For each field of a recovery recipe: its name on the page, and names of values."""


_OPTIONS = {
    "int8_io": "int8 inputs and outputs", "per_channel": "a scale for each channel of weights",
    "keep_float": "modules in float", "jobs": "processes", "std": "standard deviation",
    "equalize": "channels are equalized", "correct_bias": "biases are corrected",
    "neutron_converter_flavor": "release of NXP's converter", "wide": "values in two int8 tensors",
}  # fmt: skip
"""Names of options on the page that are not the words of the option."""


def option_facts(options: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns names and values of the options of a build for people: "evaluation samples"."""
    return [(_OPTIONS.get(name, name.replace("_", " ")), value) for name, value in options.items()]


def recipe_facts(recipe: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns names and values of a recovery recipe for people. Unknown fields and values stay as they are."""
    named = [(*_RECIPE_FACTS.get(name, (name, {})), value) for name, value in recipe.items()]
    return [(label, values.get(value, value)) for label, values, value in named]


def accuracy_heading(summary: Summary) -> str:
    """Returns the value of the last accuracy row, and that of the first."""
    first, last = summary.accuracy[0], summary.accuracy[-1]
    text = f"The {last.metric} of {last.name} is {measure_text(last.value, last.unit)}"
    if last is first:
        return f"{text}."
    return f"{text}, and that of {first.name} is {measure_text(first.value, first.unit)}."


def validation_heading(summary: Summary) -> str:
    """Returns the worst difference from the float model, or from the int8 model."""
    if summary.failures:
        count = len(summary.failures)
        return f"The .pte exceeds {'a limit' if count == 1 else f'{count} limits'} of the validation."
    against_float = [row for row in summary.validation if row.reference == "float"]
    rows = against_float or list(summary.validation)
    name = "float model" if against_float else "int8 model"
    values = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    samples = rows[0].samples
    on = "" if samples is None else f", on {count_of(samples, 'sample')}"
    if not values:
        shares = [row.equal for row in rows if row.equal is not None and row.equal < 1]
        if shares:
            share = percent_text(min(shares))
            return f"At least {share} of the values of each output of the .pte equal those of the {name}{on}."
        return f"The outputs of the .pte equal those of the {name}."
    least = decibels_text(min(values))
    return f"The outputs of the .pte have an SQNR of at least {least} against the {name}{on}."


def placement_heading(summary: Summary) -> str:
    """Returns the number of operators on the NPU, of delegates, and of operators on the CPU."""
    total, on_cpu = len(summary.placement), len(summary.on_cpu)
    on_npu = [row for row in summary.placement if row.where == "npu"]
    if not on_npu:
        return "No operator runs on the NPU."
    delegates = count_of(len({row.partition for row in on_npu}), "delegate")
    if not on_cpu:
        return (
            f"All {count_of(total, 'operator')} run on the NPU, in {delegates}."
            if total > 1
            else ("The only operator runs on the NPU.")
        )
    rest = f"{on_cpu:,} {'runs' if on_cpu == 1 else 'run'} on the CPU"
    return f"{len(on_npu):,} of {count_of(total, 'operator')} run on the NPU, in {delegates}; {rest}."


def memory_heading(summary: Summary) -> str:
    """Returns the needed memory, and that of the target."""
    memory, sram = summary.memory, summary.target.sram_bytes
    needed = bytes_text(memory.needed_bytes)
    if sram is None:
        return f"The program needs {needed}; the SRAM of the {summary.target.soc} is unknown."
    if memory.verdict == "does not fit" and memory.on_board is not None:
        return f"The program needs {needed} of memory, and does not fit into the regions of {memory.on_board.board}."
    text = f"The program needs {needed} of {bytes_text(sram)} of SRAM"
    if memory.verdict == "fits with fetch_constants_to_sram":
        return f"{text}, if its weights stay in flash."
    if memory.verdict == "does not fit":
        return f"{text}: it does not fit, {bytes_text(memory.missing_bytes)} are missing."
    return f"{text}."


def board_heading(found: BoardFit) -> str:
    """Returns the verdict on the regions of a board."""
    if found.verdict == "fits":
        return f"Memory on the board {found.board}: each part has room."
    if found.verdict == "fits with fetch_constants_to_sram":
        return f"Memory on the board {found.board}: with fetch_constants_to_sram, each part has room."
    if found.verdict == "unknown":
        return f"Memory on the board {found.board}: the size of a region is unknown."
    parts = " and ".join(one.what for one in found.without_room)
    return f"Memory on the board {found.board}: no region has room for the {parts}."


def resident_label(memory: Memory) -> str:
    """Returns the name of the needed bytes that are neither the arena nor ExecuTorch's: weights, or the program."""
    if memory.verdict == "fits with fetch_constants_to_sram":
        return WEIGHTS_OF_TWO_LAYERS
    if memory.on_board is None:
        return WEIGHTS_OF_TWO_LAYERS if memory.verdict == "does not fit" else "weights"
    flash = {region.name for region in memory.on_board.regions if region.kind == "flash"}
    in_flash = any(part.role == "program" and part.region in flash for part in memory.on_board.parts)
    return WEIGHTS_OF_TWO_LAYERS if in_flash else "program"


def cycles_heading(summary: Summary) -> str:
    """Returns the estimated cycles, and their time if the clock is known."""
    if summary.cycles is None:
        return "The cycles are unknown, because the program is compiled."
    time = "" if summary.milliseconds is None else f", which are {number_text(summary.milliseconds)} ms"
    return f"The NPU takes about {large_text(summary.cycles)} cycles{time}."


def large_text(value: int) -> str:
    """Returns a number in millions or thousands with three digits: "12.4 million"."""
    for factor, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if value >= factor:
            return number_text(value / factor) + name
    return str(value)


def analysis_heading(analysis: AnalysisRows) -> str:
    """Returns the SQNR of the outputs."""
    if analysis.output_sqnr_db is None:
        return "The outputs of the int8 model equal those of the float model."
    sqnr, count = decibels_text(analysis.output_sqnr_db), count_of(analysis.samples, "sample")
    return f"The outputs of the int8 model have an SQNR of {sqnr} against the float model, on {count}."


def errors_cancel(analysis: AnalysisRows) -> bool:
    """Whether the outputs have less error with weights and activations in int8 than with only one of the two."""
    both = analysis.output_sqnr_db
    single = [one for one in (analysis.weights_sqnr_db, analysis.activations_sqnr_db) if one is not None]
    return both is not None and bool(single) and both > min(single) + SMALLEST_DECIBELS


def layers_heading(analysis: AnalysisRows) -> str:
    """Returns the layers that need treatment, or the layer with the largest share of the error."""
    if analysis.advice:
        return f"{'This layer loses' if len(analysis.advice) == 1 else 'These layers lose'} most of the accuracy."
    shares = [(layer.error_share, layer) for layer in analysis.layers if (layer.error_share or 0) > 0]
    if not shares:
        return "No layer needs treatment."
    share, layer = max(shares, key=lambda one: one[0] or 0)
    name = f"{layer.node} ({layer.module})" if layer.module else layer.node
    return f"No layer needs treatment. The largest share of the error, {percent_text(share)}, is that of {name}."


def changed_heading(summary: Summary) -> str:
    """Returns how many samples changed sides between the first and the last accuracy row."""
    row, first = summary.accuracy[-1], summary.accuracy[0].name
    if not row.changed:
        return f"No sample changed sides between {first} and {row.name}."
    verb = "sample is" if row.lost == 1 else "samples are"
    return f"{row.lost:,} {verb} right only in {first}, and {row.gained:,} only in {row.name}."


def differences_heading(moves: int) -> str:
    """Returns the number of operators that run elsewhere than in the other build."""
    if not moves:
        return "Each operator runs where it runs in the other build."
    return f"{count_of(moves, 'operator')} {'runs' if moves == 1 else 'run'} elsewhere than in the other build."


def profile_heading(profile: ProfileRows) -> str:
    """Returns the measured cycles as a multiple of the estimate."""
    if not profile.rows:
        return "The profile has no kernels of the NPU."
    if not profile.estimated:
        return f"The board took {profile.cycles:,} cycles on the NPU."
    return f"The board took {number_text(profile.cycles / profile.estimated)} times the estimated cycles on the NPU."
