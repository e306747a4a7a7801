from __future__ import annotations

from typing import Any

import pytest
from executorch.exir.backend.compile_spec_schema import CompileSpec
from hypothesis import given
from hypothesis import strategies as st

from openneutron import CompileOptions, generate_neutron_compile_spec
from openneutron.errors import OptionError, TargetError
from openneutron.targets import TARGETS, Generation


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


names = st.text(min_size=1).filter(lambda name: bool(name.strip()) and "," not in name and _is_utf8(name))
optional_text = st.none() | st.text().filter(_is_utf8)
all_options = st.builds(
    CompileOptions,
    target=st.sampled_from(sorted(TARGETS)),
    operators_not_to_delegate=st.lists(names).map(tuple),
    neutron_converter_flavor=st.sampled_from([None, "SDK_25_06", "SDK_26_03", "3.1.1", "3.2.0"]),
    extra_flags=optional_text,
    intermediates_dir=optional_text,
    use_neutron_for_format_conversion=st.booleans(),
    fetch_constants_to_sram=st.booleans(),
    dump_kernel_selection_code=st.booleans(),
    use_profiling=st.booleans(),
)


@given(all_options)
def test_round_trip(options: CompileOptions) -> None:
    assert CompileOptions.from_specs(options.to_specs()) == options


@given(all_options)
def test_specs_have_the_types_of_executorch(options: CompileOptions) -> None:
    specs = options.to_specs()
    assert all(isinstance(spec, CompileSpec) and isinstance(spec.value, bytes) for spec in specs)
    assert len({spec.key for spec in specs}) == len(specs)
    assert (specs[0].key, specs[0].value) == ("output_format", b"tflite")


@given(all_options)
def test_the_documented_function_makes_the_same_specs(options: CompileOptions) -> None:
    specs = generate_neutron_compile_spec(
        options.target,
        extra_flags=options.extra_flags,
        intermediates_dir=options.intermediates_dir,
        operators_not_to_delegate=list(options.operators_not_to_delegate),
        use_neutron_for_format_conversion=options.use_neutron_for_format_conversion,
        fetch_constants_to_sram=options.fetch_constants_to_sram,
        dump_kernel_selection_code=options.dump_kernel_selection_code,
        use_profiling=options.use_profiling,
        neutron_converter_flavor=options.neutron_converter_flavor,
    )
    assert specs == options.to_specs()


def test_the_documented_call() -> None:
    specs = generate_neutron_compile_spec(
        "imxrt700", operators_not_to_delegate=None, neutron_converter_flavor="SDK_25_06"
    )
    options = CompileOptions.from_specs(specs)
    assert options == CompileOptions(neutron_converter_flavor="SDK_25_06")
    assert options.generation is Generation.LEGACY
    assert options.target_spec.name == "imxrt700"


def test_option_values_are_text_in_compile_specs_and_typed_in_options() -> None:
    by_key = {spec.key: spec.value for spec in generate_neutron_compile_spec("imx95", use_profiling=True)}
    assert by_key["use_profiling"] == b"True"
    assert by_key["fetch_constants_to_sram"] == b"False"
    assert "compile_flags" not in by_key


@pytest.mark.parametrize(
    "options",
    [
        {"use_profiling": "True"},
        {"use_profiling": None},
        {"fetch_constants_to_sram": 1},
        {"extra_flags": ["-v"]},
        {"intermediates_dir": 3},
        {"neutron_converter_flavor": 25},
        {"neutron_converter_flavor": "25_06"},
        {"operators_not_to_delegate": ("a,b",)},
        {"operators_not_to_delegate": ("",)},
        {"operators_not_to_delegate": (" ",)},
        {"operators_not_to_delegate": (None,)},
        {"operators_not_to_delegate": (3,)},
    ],
)
def test_invalid_option_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as error:
        CompileOptions(**options)
    assert next(iter(options)) in str(error.value)


@pytest.mark.parametrize("target", ["imxrt", "", None, 3, ["imxrt700"]])
def test_unknown_targets(target: Any) -> None:
    with pytest.raises(TargetError, match="Known targets"):
        CompileOptions(target=target)
    with pytest.raises(TargetError, match="Known targets"):
        generate_neutron_compile_spec(target)


@pytest.mark.parametrize("value", ["aten::add", b"aten::add", 3])
def test_operators_come_in_a_list(value: Any) -> None:
    with pytest.raises(OptionError, match="takes a list of names"):
        generate_neutron_compile_spec("imxrt700", operators_not_to_delegate=value)
    with pytest.raises(OptionError, match="takes a list of names"):
        CompileOptions(operators_not_to_delegate=value)


def test_a_system_config_other_than_none_is_refused() -> None:
    assert generate_neutron_compile_spec("imxrt700", None) == generate_neutron_compile_spec("imxrt700")
    with pytest.raises(OptionError, match="system_config"):
        generate_neutron_compile_spec("imxrt700", "whatever")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CompileSpec("use_profilling", b"True"), "Unknown compile spec key 'use_profilling'.*Known keys: .*use_prof"),
        (CompileSpec("use_profiling", b"yes"), "neither True nor False"),
        (CompileSpec("target", b"imxrt"), "Unknown target"),
    ],
)
def test_invalid_specs_are_refused(spec: CompileSpec, message: str) -> None:
    with pytest.raises((OptionError, TargetError), match=message):
        CompileOptions.from_specs([spec])


@pytest.mark.parametrize("specs", [None, "imxrt700", 3, [3], ["target"]])
def test_values_that_are_not_specs_are_refused(specs: Any) -> None:
    with pytest.raises(OptionError, match="generate_neutron_compile_spec"):
        CompileOptions.from_specs(specs)
