"""The options of a compilation, and their conversion to and from ExecuTorch's compile specs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from openneutron.errors import OptionError
from openneutron.targets import Generation, NeutronTargetSpec, Target, generation_of_flavor

if TYPE_CHECKING:
    from executorch.exir.backend.compile_spec_schema import CompileSpec

__all__ = ["CompileOptions", "converter_fields", "generate_neutron_compile_spec", "list_of_names"]

# The key of each option in ExecuTorch's own backend, in its order. All values are UTF-8 text.
_KEYS = {
    "extra_flags": "compile_flags",
    "target": "target",
    "intermediates_dir": "intermediates_dir",
    "operators_not_to_delegate": "operators_not_to_delegate",
    "neutron_converter_flavor": "neutron_converter_flavor",
    "use_neutron_for_format_conversion": "use_neutron_for_format_conversion",
    "fetch_constants_to_sram": "fetch_constants_to_sram",
    "dump_kernel_selection_code": "dump_kernel_selection_code",
    "use_profiling": "use_profiling",
    "payload": "payload",
}
PAYLOADS = ("auto", "portable", "device")
_OUTPUT_FORMAT = ("output_format", b"tflite")
_BOOLEANS = {"True": True, "False": False}


@dataclass(frozen=True)
class CompileOptions:
    """All options of a compilation. Raises `OptionError` or `TargetError` for an invalid value."""

    target: str = "imxrt700"
    """The name of a chip. A board or a board file stands for its chip."""
    operators_not_to_delegate: tuple[str, ...] = ()
    neutron_converter_flavor: str | None = None
    extra_flags: str | None = None
    intermediates_dir: str | None = None
    use_neutron_for_format_conversion: bool = True
    fetch_constants_to_sram: bool = False
    dump_kernel_selection_code: bool = False
    use_profiling: bool = False
    payload: str = "auto"
    """"portable", "device", or "auto": "device" if a matching converter is installed, else "portable"."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise OptionError(f"{field.name} takes True or False, not {value!r}.")
            if field.type == "str | None" and not (value is None or isinstance(value, str)):
                raise OptionError(f"{field.name} takes text or None, not {value!r}.")
        list_of_names(self.operators_not_to_delegate)
        if self.payload not in PAYLOADS:
            raise OptionError(f"payload is one of {', '.join(PAYLOADS)}, not {self.payload!r}.")
        object.__setattr__(self, "target", NeutronTargetSpec(self.target).name)
        generation_of_flavor(self.neutron_converter_flavor)

    @property
    def generation(self) -> Generation:
        """The converter generation whose operator limits apply."""
        return generation_of_flavor(self.neutron_converter_flavor)

    @property
    def target_spec(self) -> NeutronTargetSpec:
        """The properties of the target."""
        return NeutronTargetSpec(self.target)

    def to_specs(self) -> list[CompileSpec]:
        """Returns the options as ExecuTorch's compile specs. Leaves out options that are None, and `payload="auto"`."""
        from executorch.exir.backend.compile_spec_schema import CompileSpec

        specs = [CompileSpec(*_OUTPUT_FORMAT)]
        for name, key in _KEYS.items():
            value = getattr(self, name)
            if value is not None and (name, value) != ("payload", "auto"):
                text = ",".join(value) if isinstance(value, tuple) else str(value)
                specs.append(CompileSpec(key, text.encode()))
        return specs

    @classmethod
    def from_specs(cls, specs: Sequence[CompileSpec]) -> CompileOptions:
        """Reads options from the result of `to_specs`. Raises `OptionError` for an unknown key or an invalid value."""
        if not isinstance(specs, (list, tuple)) or not all(hasattr(spec, "key") for spec in specs):
            raise OptionError(f"compile_spec takes the result of generate_neutron_compile_spec, not {specs!r}.")
        return cls.from_values({spec.key: bytes(spec.value) for spec in specs})

    @classmethod
    def from_values(cls, specs: Mapping[str, bytes]) -> CompileOptions:
        """Reads options from the compile specs of a `.pte`, by key. Raises `OptionError` as `from_specs` does."""
        by_key = {key: name for name, key in _KEYS.items()}
        values: dict[str, Any] = {}
        for key, value in specs.items():
            if key == _OUTPUT_FORMAT[0]:
                continue
            if key not in by_key:
                raise OptionError(
                    f"Unknown compile spec key '{key}'; use generate_neutron_compile_spec. Known keys: "
                    f"{', '.join(by_key)}."
                )
            try:
                text = value.decode()
            except UnicodeDecodeError as error:
                raise OptionError(f"Compile spec '{key}' is not UTF-8 text: {value!r}.") from error
            values[by_key[key]] = _parse(by_key[key], text)
        return cls(**values)


def _parse(name: str, text: str) -> object:
    if name == "operators_not_to_delegate":
        return tuple(filter(None, text.split(",")))
    if isinstance(getattr(CompileOptions, name), bool):
        if text not in _BOOLEANS:
            raise OptionError(f"Compile spec '{name}' is '{text}', which is neither True nor False.")
        return _BOOLEANS[text]
    return text


def converter_fields(extra_flags: str | None) -> dict[str, object]:
    """Returns the fields of the converter's `compilationOpts` in a text of "name=value" items separated by spaces.

    A value is a number, True, False, or text. Raises `OptionError` for other text.
    """
    found: dict[str, object] = {}
    for item in (extra_flags or "").split():
        name, equals, value = item.partition("=")
        name = name.lstrip("-")
        if not equals or not name.isidentifier():
            raise OptionError(
                f"extra_flags takes 'name=value' items separated by spaces, where name is a field of the converter's "
                f"compilationOpts; '{item}' is not such an item."
            )
        found[name] = _field_value(value)
    return found


def _field_value(text: str) -> object:
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    try:
        return int(text)
    except ValueError:
        return text


def list_of_names(names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns `operators_not_to_delegate` as a tuple. Raises `OptionError` if it is not a list of names."""
    if isinstance(names, (str, bytes)) or not (names is None or isinstance(names, Iterable)):
        raise OptionError(f"operators_not_to_delegate takes a list of names, not {names!r}.")
    found = tuple(names or ())
    for name in found:
        if not isinstance(name, str) or not name.strip() or "," in name:
            raise OptionError(
                f"operators_not_to_delegate takes operator or node names, not {name!r}. Give one name in each item."
            )
    return found


def generate_neutron_compile_spec(  # noqa: PLR0917  the order of ExecuTorch's own function
    config: Target,
    system_config: str | None = None,
    extra_flags: str | None = None,
    intermediates_dir: str | None = None,
    operators_not_to_delegate: Sequence[str] | None = None,
    use_neutron_for_format_conversion: bool = True,
    fetch_constants_to_sram: bool = False,
    dump_kernel_selection_code: bool = False,
    use_profiling: bool = False,
    *,
    neutron_converter_flavor: str | None = None,
    payload: str = "auto",
) -> list[CompileSpec]:
    """Returns the compile specs of `NeutronPartitioner` for a target.

        partitioner = NeutronPartitioner(generate_neutron_compile_spec("imxrt700"))

    - `config`: a target: the name of a chip or of a board, or a board file. The compile specs hold the chip's name.
    - `system_config`: must be None. It exists for scripts that pass it.
    - `extra_flags`: fields of the converter's `compilationOpts`, as "name=value ...".
    - `intermediates_dir`: a folder for the TFLite model of each partition and the dumps of the passes.
    - `operators_not_to_delegate`: operators that run on the CPU. Names of operators ("aten::conv2d",
      "aten.conv2d.default", edge names) and of nodes, matched exactly.
    - `use_neutron_for_format_conversion`: whether the NPU converts between NCHW and NHWC. For the legacy generation,
      the runtime converts in any case.
    - `fetch_constants_to_sram`: whether the weights stay in flash and are fetched to SRAM layer by layer.
    - `dump_kernel_selection_code`: whether to write the kernel selection of a device program.
    - `use_profiling`: whether the NPU measures the time of its kernels.
    - `neutron_converter_flavor`: the release of the vendor's converter whose operator limits apply, such as
      "SDK_25_06". None means the modern generation.
    - `payload`: "portable" (a TFLite model, for the host), "device" (microcode, which the vendor's converter writes),
      or "auto" ("device" if a matching converter is installed, else "portable").

    Raises `TargetError` for an unknown target, and `OptionError` for any other invalid value.
    """
    if system_config is not None:
        raise OptionError(f"system_config is not used by any Neutron target; got {system_config!r}. Leave it out.")
    options = CompileOptions(
        target=NeutronTargetSpec(config).name,
        operators_not_to_delegate=list_of_names(operators_not_to_delegate),
        neutron_converter_flavor=neutron_converter_flavor,
        extra_flags=extra_flags,
        intermediates_dir=intermediates_dir,
        use_neutron_for_format_conversion=use_neutron_for_format_conversion,
        fetch_constants_to_sram=fetch_constants_to_sram,
        dump_kernel_selection_code=dump_kernel_selection_code,
        use_profiling=use_profiling,
        payload=payload,
    )
    return options.to_specs()
