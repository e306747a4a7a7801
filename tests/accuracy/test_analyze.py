"""Accuracy analysis: its measurements, compared with computations by hand, and its advice."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.networks import NETWORKS
from tests.accuracy_models import PLAIN, altered, images, layer_row, net, quantized, sabotaged
from tests.flow_support import convert, seeded
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer, QuantizedModel, lower, quantize
from openneutron.accuracy import Analysis, LayerAccuracy, analyze
from openneutron.accuracy.advice import (
    FLOAT,
    RULES,
    Finding,
    OutputSqnr,
    TreatedLayer,
    code_of,
    finding_of,
    key_of,
    layers_to_treat,
    verdict,
)
from openneutron.core.fx import is_dequantize, is_quantize
from openneutron.errors import InputError, ModelError, OptionError, OutputError
from openneutron.recovery import Recipe


@pytest.fixture(scope="module")
def broken() -> QuantizedModel:
    return quantized(sabotaged())


@pytest.fixture(scope="module")
def found(broken: QuantizedModel) -> Analysis:
    return analyze(None, broken, images(6, seed=2), program=lower(broken))


# ------------------------------------------------------------------------------------------------ shares of the error


def test_a_sabotaged_layer_comes_first_with_nearly_all_of_the_error(found: Analysis) -> None:
    worst = found.layers[0]
    assert (worst.module, worst.op, worst.activation) == ("second", "aten.conv2d.default", "aten.relu6.default")
    assert worst.error_share is not None
    assert worst.error_share > 0.85
    assert all(abs(layer.error_share or 0) < 0.2 for layer in found.layers[1:])
    assert worst.weak_channels == 15
    assert sorted(worst.largest_codes)[-1] == 127
    assert sorted(worst.largest_codes)[-2] <= 3


def test_the_advice_is_per_channel_scales_and_has_the_stated_gain(found: Analysis) -> None:
    (advice,) = found.advice
    assert advice.module == "second"
    assert advice.code == 'layers={"second": "per_channel"}'
    assert advice.error_reduction is not None
    assert advice.error_reduction > 0.85
    assert advice.why.endswith("largest code of half of them is at most 1 of 127.")
    assert "'conv2d_1' (second)" in found.verdict
    treated = quantized(sabotaged(), **eval(f"dict({advice.code})"))
    after = analyze(None, treated, images(6, seed=2))
    promised = found.output_sqnr_db - 10 * math.log10(1 - advice.error_reduction)
    assert after.output_sqnr_db == pytest.approx(promised, abs=1.5)
    assert not after.advice
    assert after.verdict.endswith("No layer needs treatment.")
    assert layer_row(after, "second").weak_channels == 0


def test_the_error_share_is_the_gain_with_the_layer_in_float(found: Analysis, broken: QuantizedModel) -> None:
    """Compares with a model quantized again with `layers`. Only the next layer's own quantize node differs."""
    in_float = quantized(sabotaged(), layers={"second": "float", "aten.relu6.default": "float"})
    model, data = sabotaged(), images(6, seed=2)
    with torch.no_grad():
        errors = [sum(float((run(x) - model(x)).square().sum()) for x in data) for run in (broken, in_float)]
    assert found.layers[0].error_share == pytest.approx(1 - errors[1] / errors[0], abs=0.02)


def test_only_the_candidates_with_most_noise_are_measured(broken: QuantizedModel) -> None:
    some = analyze(None, broken, images(3), candidates=2, share_samples=1)
    assert [layer.error_share is None for layer in some.layers] == [False, False, *[True] * (len(some.layers) - 2)]
    assert some.layers[0].module == "second"
    assert some.share_samples == 1
    assert "not measured" in str(some)
    unmeasured = [layer.sqnr_db for layer in some.layers[2:]]
    assert unmeasured == sorted(unmeasured)


def test_moves_are_not_layers_and_keep_float_values(found: Analysis) -> None:
    assert [layer.op for layer in sorted(found.layers, key=lambda layer: layer.position)] == [
        "input", "aten.conv2d.default", "aten.conv2d.default", "aten.conv2d.default", "aten.mean.dim",
        "aten.linear.default",
    ]  # fmt: skip


def test_a_softmax_at_the_end_does_not_change_shares() -> None:
    """A softmax at the end does not change the shares of other layers, whether it is quantized or not."""
    model = sabotaged()
    plain, soft = (quantized(nn.Sequential(model, *ends).eval()) for ends in ([], [nn.Softmax(1)]))
    data = images(3, seed=2)
    shares, others = (
        {layer.node: layer.error_share for layer in analyze(None, one, data).layers} for one in (plain, soft)
    )
    assert others.pop("softmax") == 0.0
    assert others == pytest.approx(shares)


# --------------------------------------------------------------------------------------------------------- statistics


def dequantized(value: Tensor, low: float, high: float) -> Tensor:
    scale = (high - low) / 255
    return (torch.round((value - low) / scale)).clamp(0, 255) * scale + low


def test_sqnr_equals_a_computation_by_hand(healthy: QuantizedModel) -> None:
    data, model = images(3, seed=4), net()
    analysis = analyze(None, healthy, data)
    layer = layer_row(analysis, "first")
    (entry,) = (one for one in analysis.layers if one.op == "input")
    conv = model.first
    scale = conv.weight.abs().max() / 127
    weight = torch.round(conv.weight / scale) * scale
    assert layer.weight_scales == pytest.approx((float(scale), float(scale)))
    assert layer.weight_range == (float(conv.weight.min()), float(conv.weight.max()))
    signal = noise = own_noise = 0.0
    with torch.no_grad():
        for x in data:
            wanted = torch.relu(conv(x))
            inputs = dequantized(x, *entry.int8_range)
            computed = torch.relu(nn.functional.conv2d(inputs, weight, conv.bias, padding=1))
            value = dequantized(computed, *layer.int8_range)
            signal += float(wanted.square().sum())
            noise += float((value - wanted).square().sum())
            own_noise += float((value - torch.relu(conv(inputs))).square().sum())
    assert layer.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.1)
    assert layer.own_sqnr_db == pytest.approx(10 * math.log10(signal / own_noise), abs=0.1)
    assert layer.own_sqnr_db > layer.sqnr_db


def test_sqnr_of_the_output_compares_the_two_models(healthy: QuantizedModel) -> None:
    data, model = images(5, seed=4), net()
    with torch.no_grad():
        signal = sum(float(model(x).square().sum()) for x in data)
        noise = sum(float((healthy(x) - model(x)).square().sum()) for x in data)
    analysis = analyze(None, healthy, data)
    assert analysis.output_sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert layer_row(analysis, "head").sqnr_db == pytest.approx(analysis.output_sqnr_db)


def test_sqnr_with_int8_weights_equals_float_with_rounded_weights(healthy: QuantizedModel) -> None:
    data, model, rounded = images(5, seed=4), net(), net()
    with torch.no_grad():
        for layer in (rounded.first, rounded.second, rounded.third, rounded.head):
            scale = layer.weight.abs().max() / 127
            layer.weight.copy_(torch.round(layer.weight / scale) * scale)
        signal = sum(float(model(x).square().sum()) for x in data)
        noise = sum(float((rounded(x) - model(x)).square().sum()) for x in data)
    analysis = analyze(None, healthy, data)
    assert analysis.weights_sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.01)
    assert analysis.output_sqnr_db < min(analysis.weights_sqnr_db, analysis.activations_sqnr_db)
    assert f"{analysis.weights_sqnr_db:.1f} with only weights" in analysis.verdict
    head = layer_row(analysis, "head")
    assert head.weights_sqnr_db == pytest.approx(analysis.weights_sqnr_db, abs=1e-3)
    assert head.activations_sqnr_db == pytest.approx(analysis.activations_sqnr_db, abs=1e-3)


def test_exact_weights_leave_only_noise_of_activations() -> None:
    model = net()
    with torch.no_grad():
        for layer in (model.first, model.second, model.third, model.head):
            layer.weight.copy_(torch.round(layer.weight / layer.weight.abs().max() * 127) / 128)
            layer.bias.zero_()  # type: ignore[union-attr]
    analysis = analyze(None, quantized(model), images(3, seed=4))
    assert analysis.weights_sqnr_db > 100
    assert analysis.activations_sqnr_db == pytest.approx(analysis.output_sqnr_db, abs=1e-3)


def test_dead_channels_and_saturation_are_counted_as_by_brute_force() -> None:
    model = net()
    conv = model.first
    with torch.no_grad():
        conv.bias[[2, 7]] = -50.0  # type: ignore[index]
        conv.weight[5] *= 1e-4
        conv.bias[5] = 1e-3  # type: ignore[index]
    data = images(4, seed=5, scale=2.0)
    layer = layer_row(analyze(None, quantized(model), data), "first")
    with torch.no_grad():
        outputs = torch.cat([torch.relu(conv(x)) for x in data]).transpose(0, 1).flatten(1)
    low, high = layer.int8_range
    step = (high - low) / 255
    assert layer.channels == len(outputs) == 16
    assert layer.dead_channels == sum(len(channel.unique()) == 1 for channel in outputs) == 2
    codes = torch.round(outputs.clamp(low, high) / step)
    assert layer.lost_channels == sum(len(channel.unique()) == 1 for channel in codes) - 2 == 1
    clipped = int((outputs > high + step / 2).sum())
    assert clipped > 0
    assert layer.saturation == pytest.approx(clipped / outputs.numel())
    assert layer.float_range == (float(outputs.min()), float(outputs.max()))


def test_relus_are_not_saturation_and_single_values_are_not_dead_channels(healthy: QuantizedModel) -> None:
    analysis = analyze(None, healthy, images(1))
    assert layer_row(analysis, "first").saturation == 0.0
    assert all(layer.dead_channels == layer.lost_channels == 0 for layer in analysis.layers if layer.channels == 10)


def test_histograms_have_every_value_in_64_bins(found: Analysis) -> None:
    layer = layer_row(found, "third")
    assert len(layer.histogram.reference) == len(layer.histogram.quantized) == 64
    assert sum(layer.histogram.reference) == sum(layer.histogram.quantized) == 6 * 16 * 4 * 4


# ------------------------------------------------------------------------------------------------------------- advice


def test_advice_for_weights_limited_to_one_scale_is_float() -> None:
    features = 2**16  # more than a convolution supports
    model = seeded(lambda: nn.Sequential(nn.Linear(features, 16), nn.ReLU6(), nn.Linear(16, 8)))
    with torch.no_grad():
        model.get_parameter("0.weight")[3] *= 300
    data = [torch.randn(4, features, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    analysis = analyze(None, quantize(model, (data[0],), data, recover=None), data)
    assert analysis.advice[0].code == 'layers={"0": "float"}'
    assert "channels of its weight use fewer than 8 of 255 codes" in analysis.advice[0].why
    assert analysis.advice[0].error_reduction == analysis.layers[0].error_share


def test_saturation_asks_for_another_observer_or_calibration() -> None:
    model = net()
    narrow = quantize(model, (images(1)[0],), images(4, scale=0.2))
    analysis = analyze(None, narrow, images(4, seed=6))
    layer = layer_row(analysis, "first")
    assert layer.saturation > 0.1
    finding = finding_of(TreatedLayer(layer, None))
    assert code_of(finding, analysis.layers) == "observer=RangeObserver"
    assert f"{100 * layer.saturation:.1f} % of its values" in finding.why


def test_every_rule_says_why_with_numbers_of_a_layer(found: Analysis) -> None:
    why = {rule: Finding(TreatedLayer(found.layers[0], None), rule).why for rule in RULES}
    assert all("{" not in text for text in why.values())
    assert sum(any(character.isdigit() for character in text) for text in why.values()) == len(RULES)


def test_an_error_of_many_layers_is_not_attributed_to_one_layer(found: Analysis) -> None:
    many = [replace(layer, error_share=0.05) for layer in found.layers]
    bad, good = OutputSqnr(5, 6, 12), OutputSqnr(40, 43, 43)
    assert layers_to_treat(many, bad) == ()
    assert layers_to_treat(found.layers, bad) == found.layers[:1]
    assert layers_to_treat(found.layers, good) == ()


def test_the_verdict_says_whether_weights_or_activations_cause_most() -> None:
    numbers = (
        r"The SQNR of the outputs is 5\.0 dB \(6\.0 with only weights .*, 12\.0 with only activations in int8\)\. "
    )
    weights = r'No .* layer .* Weights cause most .*.* layers \(recover="auto", weight_granularity="per_channel"'
    assert re.match(numbers + weights, verdict((), OutputSqnr(5, 6, 12)))
    activations = (
        r'No measured layer .* Activations cause most .* treat all layers \(recover="auto", recover="best", which'
    )
    assert re.search(activations, verdict((), OutputSqnr(5, 12, 6)))
    assert verdict((), OutputSqnr(40, 43, 43)).endswith("with only activations in int8). No layer needs treatment.")
    for kept in (OutputSqnr(5, 6, 12), OutputSqnr(5, 12, 6)):
        assert 'recover="auto"' not in verdict((), kept, learned_rounding=True)


def test_advice_omits_learned_rounding_if_it_was_applied(found: Analysis) -> None:
    for rule in RULES:
        for_it = [
            Finding(TreatedLayer(found.layers[0], None, learned_rounding), rule).what
            for learned_rounding in (False, True)
        ]
        assert "{" not in "".join(for_it)
        assert 'recover="auto"' not in for_it[1]
        assert ('recover="auto"' in for_it[0]) == (rule.remedy == FLOAT)
    coarse = quantized(net(), weight_bits=3, weight_granularity="per_channel")
    for recipe, is_said in ((None, True), (Recipe("biases"), True), (Recipe("weights"), False)):
        analysis = analyze(None, replace(coarse, recipe=recipe), images(3, seed=2))
        assert analysis.advice
        assert all(('recover="auto"' in advice.what) == is_said for advice in analysis.advice)


def test_a_key_names_the_operator_if_the_module_has_several(found: Analysis) -> None:
    assert key_of(found.layers[0], found.layers) == "second"
    (mean,) = (layer for layer in found.layers if layer.op == "aten.mean.dim")
    assert mean.module == ""
    assert key_of(mean, found.layers) == "aten.mean.dim"


# ------------------------------------------------------------------------------------------------------------ formats


def test_json_has_all_results_and_can_be_read_back(found: Analysis, tmp_path: Path) -> None:
    found.save_json(tmp_path / "found.json")
    text = (tmp_path / "found.json").read_text()
    assert text == found.to_json()
    back = json.loads(text)
    assert [LayerAccuracy(**{**layer, "histogram": None}).node for layer in back["layers"]] == [
        layer.node for layer in found.layers
    ]
    assert back == json.loads(json.dumps(asdict(found)).replace("-Infinity", "null").replace("Infinity", "null"))


def test_infinite_numbers_are_null_in_json(found: Analysis) -> None:
    perfect = replace(found, output_sqnr_db=math.inf)
    assert json.loads(perfect.to_json())["output_sqnr_db"] is None


def test_the_page_is_complete_and_names_the_layers(found: Analysis, tmp_path: Path) -> None:
    found.save_html(tmp_path / "found.html")
    page = (tmp_path / "found.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)=", page)
    assert found.verdict.replace("'", "&#39;") in page
    for layer in found.layers:
        assert f"Histogram of {layer.node}:" in page
    for advice in found.advice:
        assert advice.what in page
    assert "layers is within the tolerance of its operator" in page


def test_a_page_that_cannot_be_written_is_an_output_error(found: Analysis, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Cannot write"):
        found.save_html(tmp_path / "nowhere" / "found.html")


def test_the_text_has_verdict_advice_and_layers(found: Analysis) -> None:
    text = str(found)
    assert text.startswith(found.verdict)
    assert 'quantize(..., layers={"second": "per_channel"})' in text
    assert "Each of the" in text
    assert found.table(2).row_count == 2
    assert found.table().row_count == len(found.layers)


# ------------------------------------------------------------------------------------------------------------- inputs


def documented(model: nn.Module, quantizer: NeutronQuantizer | None = None) -> Any:
    calibration = [(image,) for image in images(8)]
    return convert(model, (images(1)[0],), quantizer=quantizer or NeutronQuantizer(**PLAIN), calibration=calibration)


def test_a_module_of_the_documented_flow_is_analyzed_the_same_way(found: Analysis) -> None:
    other = analyze(sabotaged(), documented(sabotaged()), images(6, seed=2))
    assert other.layers == found.layers
    assert other.advice == found.advice


def test_a_quantizer_with_options_makes_its_own_float_graph() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    quantizer = NeutronQuantizer(layers={nn.SiLU: "float"})
    module = documented(model, quantizer)
    rows = analyze(model, module, images(2), quantizer=NeutronQuantizer(layers={nn.SiLU: "float"})).layers
    assert {one.op for one in rows} >= {"aten.silu.default", "aten.conv2d.default"}


def test_the_float_graph_equals_the_model(healthy: QuantizedModel) -> None:
    assert healthy.reference is not None
    x = images(1, seed=7)[0]
    torch.testing.assert_close(healthy.reference(x), net()(x))
    assert not any(is_quantize(node) or is_dequantize(node) for node in healthy.reference.graph.nodes)


def test_labels_after_the_inputs_are_ignored(healthy: QuantizedModel) -> None:
    data = images(2)
    plain = analyze(None, healthy, data).layers
    assert analyze(None, healthy, [(x, torch.tensor([3])) for x in data]).layers == plain
    assert analyze(None, healthy, [((x,), 3) for x in data]).layers == plain


def test_progress_is_told_every_step(healthy: QuantizedModel) -> None:
    steps: list[tuple[int, int]] = []
    rows = analyze(None, healthy, images(3), share_samples=2, progress=lambda *step: steps.append(step)).layers
    total = 3 + 2 * len(rows)
    assert steps == [(step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("data", [[], [(1, 2)], [torch.zeros(1, 8, 5, 5)]])
def test_data_that_do_not_fit_are_an_input_error(healthy: QuantizedModel, data: list[Any]) -> None:
    with pytest.raises(InputError):
        analyze(None, healthy, data)


def test_numbers_that_are_not_positive_are_an_option_error(healthy: QuantizedModel) -> None:
    with pytest.raises(OptionError, match="candidates must be a positive integer"):
        analyze(None, healthy, images(1), candidates=0)


def test_a_pair_of_different_models_is_a_model_error(healthy: QuantizedModel) -> None:
    module, data = healthy.module, images(1)
    with pytest.raises(ModelError, match="or the float model that was exported"):
        analyze(None, module, data)
    with pytest.raises(ModelError, match=r"no such node.*quantizer="):
        analyze(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(1600, 10)).eval(), module, data)
    with pytest.raises(ModelError, match=r"module 'first', its weight has other values"):
        analyze(net(seed=1), module, data)
    wider = net()
    wider.first = nn.Conv2d(8, 16, 5, padding=2).eval()
    with pytest.raises(ModelError, match=r"shape \(16, 8, 5, 5\) in the float graph"):
        analyze(wider, module, data)
    with pytest.raises(ModelError, match="in train mode"):
        analyze(net().train(), module, data)
    with pytest.raises(ModelError, match="no quantized layer"):
        analyze(net(), torch.export.export(net(), (data[0],)).module(), data)


@pytest.mark.data
@pytest.mark.slow
def test_mobilenet_v2_loses_accuracy_in_depthwise_convolutions() -> None:
    network = NETWORKS["mobilenet_v2"]
    model = quantize(network.build(), network.example_inputs(), network.calibration().spread(8), recover=None, **PLAIN)
    analysis = analyze(None, model, network.evaluation().spread(4), candidates=8)
    assert analysis.output_sqnr_db < 12
    assert len(analysis.layers) == 65
    assert sum(layer.error_share is not None for layer in analysis.layers) == 8
    assert {"features.3.conv.1.0", "features.5.conv.1.0"} & {layer.module for layer in analysis.layers[:3]}


def test_the_documented_flow_of_torchao_itself(found: Analysis) -> None:
    """Does the same as `documented` with each call written out, on a model that the user exported."""
    model = sabotaged()
    prepared = prepare_pt2e(torch.export.export(model, (images(1)[0],)).module(), NeutronQuantizer(**PLAIN))
    for image in images(8):
        prepared(image)
    assert analyze(model, convert_pt2e(prepared), images(6, seed=2)).verdict == found.verdict


def test_an_analysis_reports_the_program_that_differs(healthy: QuantizedModel) -> None:
    analysis = analyze(None, healthy, images(2), program=lower(altered(healthy, "conv2d_2")))
    assert analysis.comparison is not None
    assert "The first layer that exceeds its tolerance is conv2d_2 (module 'third')" in str(analysis)
