"""Bad input is rejected with a message that names the node."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import models
from tests.flow_support import (
    Inputs,
    convert,
    flat,
    seeded,
)
from tests.models import Model, bn, conv, image, small, with_dropout
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronPartitioner, NeutronQuantizer, generate_neutron_compile_spec, load, lower, quantize
from openneutron.core.files import read_file, write_file
from openneutron.errors import (
    CalibrationError,
    ConverterError,
    HostError,
    InputError,
    ModelError,
    OpenNeutronError,
    OptionError,
    OutputError,
    TargetError,
)
from openneutron.vendor import sdk


def prepared(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    return prepare_pt2e(torch.export.export(model, inputs, **options).module(), NeutronQuantizer())


def in_train_mode(name: str) -> nn.Module:
    model = seeded(lambda: Model(with_dropout, c=conv(), b=bn(), d=nn.Dropout(0.5), l=nn.Linear(256, 5)))
    model.get_submodule(name).train()
    return model


class TestErrors:
    @pytest.mark.parametrize("name", ["", "b", "d"])
    def test_train_mode(self, name: str) -> None:
        with pytest.raises(ModelError, match=r"train mode\. Call model\.eval\(\)") as error:
            prepared(in_train_mode(name), (image(),))
        assert error.value.node is not None
        assert error.value.source is not None
        assert error.value.source.startswith(models.__file__)
        with pytest.raises(ModelError, match=r"is in train mode.*\. Call model\.eval\(\)"):
            quantize(in_train_mode(name), (image(),), [image()])

    def test_batch_norm_without_statistics(self) -> None:
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        model = Model(lambda m, x: m.b(m.c(x)), c=conv(), b=norm).eval()
        with pytest.raises(ModelError, match="track_running_stats=True") as error:
            prepared(model, (image(),))
        assert (error.value.node, error.value.op) == ("batch_norm", "aten.batch_norm.default")
        with pytest.raises(ModelError, match="track_running_stats=True"):
            quantize(model, (image(),), [image()])

    def test_dynamic_shapes(self) -> None:
        shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
        model = nn.Sequential(conv(), nn.ReLU()).eval()
        with pytest.raises(ModelError, match=r"dynamic.*Export without dynamic_shapes") as error:
            prepared(model, (image(2, 4, 8, 8),), dynamic_shapes=shapes)
        assert error.value.node is not None
        assert error.value.node.startswith("input")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_dtype(self, dtype: torch.dtype) -> None:
        model, x = nn.Sequential(conv(), nn.ReLU()).eval().to(dtype), image().to(dtype)
        with pytest.raises(ModelError, match=rf"{dtype} is not supported.*model\.float\(\)"):
            prepared(model, (x,))
        with pytest.raises(ModelError, match=rf"{dtype} is not supported.*model\.float\(\)"):
            quantize(model, (x,), [x])

    def test_dtype_of_the_input_alone(self) -> None:
        with pytest.raises(InputError, match=r"torch\.float64 \(1, 4, 8, 8\)"):
            quantize(seeded(small), (image().double(),), [image().double()])

    def test_calibration_never_ran(self) -> None:
        with pytest.raises(CalibrationError, match=r"never reached.*before convert_pt2e") as error:
            convert_pt2e(prepared(seeded(small), (image(),)))
        assert error.value.node is not None
        with pytest.raises(CalibrationError, match="empty"):
            quantize(seeded(small), (image(),), [])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_calibration_on_values_that_are_not_finite(self, value: float) -> None:
        x = image()
        x[0, 0, 0, 0] = value
        module = prepared(seeded(small), (image(),))
        module(x)
        module(image())
        with pytest.raises(CalibrationError, match="NaN or infinite") as error:
            convert_pt2e(module)
        assert error.value.node is not None
        # Minus infinity in data may be a mask, so the error names the value that becomes infinite.
        named = "minimum -inf" if value == -float("inf") else "Item 1 of the data contains NaN or infinite"
        with pytest.raises(CalibrationError, match=named):
            quantize(seeded(small), (image(),), [image(), x])

    def test_weights_that_are_not_finite(self) -> None:
        convolution = conv()
        convolution.weight.data[0] = float("nan")
        model = Model(lambda m, x: m.c(x), c=convolution).eval()
        with pytest.raises(CalibrationError, match="weights") as error:
            quantize(model, (image(),), [image()])
        assert error.value.source is not None
        assert error.value.source.startswith(models.__file__)

    @pytest.mark.parametrize(
        "x", [image(1, 4, 9, 9), image(2, 4, 8, 8), image(1, 3, 8, 8), image().double(), image().int()]
    )
    def test_calibration_of_another_shape_or_dtype(self, x: torch.Tensor) -> None:
        described = rf"{x.dtype} \({', '.join(map(str, x.shape))}\)".replace(".", r"\.")
        with pytest.raises(InputError, match=rf"Input 'inputs_0' is {described}; .*torch\.float32 \(1, 4, 8, 8\)"):
            prepared(seeded(small), (image(),))(x)
        with pytest.raises(CalibrationError, match="Item 1 of the data is"):
            quantize(seeded(small), (image(),), [image(), x])

    @pytest.mark.parametrize("data", [None, 3])
    def test_calibration_data_that_are_not_iterable(self, data: Any) -> None:
        with pytest.raises(CalibrationError, match="iterable"):
            quantize(seeded(small), (image(),), data)
        with pytest.raises(CalibrationError, match="Item 0 of the data is"):
            quantize(seeded(small), (image(),), [data])

    @pytest.mark.parametrize("examples", [(image(1, 3, 8, 8),), (image(), image()), (), None, (3,), 3])
    def test_example_inputs_that_do_not_match(self, examples: Any) -> None:
        with pytest.raises(InputError, match=r"example.inputs"):
            quantize(seeded(small), examples, [image()])

    @pytest.mark.parametrize("examples", [(image(1, 4, 9, 9),), (image().double(),), (image(), image()), None])
    def test_lower_with_example_inputs_that_do_not_match(self, examples: Any) -> None:
        module = convert(seeded(small), (image(),))
        with pytest.raises(InputError, match=r"example.inputs"):
            lower(module, examples)

    def test_lower_a_model_that_is_not_quantized(self) -> None:
        for model in (seeded(small), torch.export.export(seeded(small), (image(),)).module()):
            with pytest.raises(ModelError, match=r"Call quantize\(\) first"):
                lower(model, (image(),))  # type: ignore[arg-type]

    def test_unknown_target(self) -> None:
        module = convert(seeded(small), (image(),))
        attempts: list[Callable[[], object]] = [
            lambda: NeutronQuantizer("imxrt800"),
            lambda: quantize(seeded(small), (image(),), [image()], "imxrt800"),
            lambda: lower(module, (image(),), target="imxrt800"),
            lambda: generate_neutron_compile_spec("imxrt800"),
        ]
        for attempt in attempts:
            with pytest.raises(TargetError, match=r"Did you mean 'imxrt700'.*Known targets: imxrt700, mcxn94x"):
                attempt()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("RT700", "Did you mean 'imxrt700'"),
            ("i.MX RT700", "Did you mean 'imxrt700'"),
            ("IMX95", "Did you mean 'imx95'"),
            ("mcx-n947", "Did you mean 'mcxn94x'"),
            ("imx95-SDK_25_06", "give 'imx95', and neutron_converter_flavor='SDK_25_06'"),
            ("SDK_25_06", "'SDK_25_06' is a converter flavour"),
            ("kinara", r"Unknown target 'kinara'\. Known targets"),
        ],
    )
    def test_suggestions_for_unknown_targets(self, name: str, message: str) -> None:
        with pytest.raises(TargetError, match=message):
            NeutronQuantizer(name)

    @pytest.mark.parametrize("flavor", ["25_06", "sdk_25_06", "SDK-25-06", "SDK_25_6", "SDK 25.06"])
    def test_suggestions_for_unknown_flavors(self, flavor: str) -> None:
        with pytest.raises(OptionError, match="Did you mean 'SDK_25_06'"):
            generate_neutron_compile_spec("imxrt700", neutron_converter_flavor=flavor)

    def test_a_misspelt_target_option(self) -> None:
        with pytest.raises(OptionError, match="Did you mean 'target'"):
            quantize(seeded(small), (image(),), [image()], targte="imx95")
        with pytest.raises(OptionError, match="Did you mean 'target'"):
            lower(convert(seeded(small), (image(),)), (image(),), targte="imx95")

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.ENOSPC, r"No space left.*Free some space"),
            (errno.EACCES, r"Permission denied.*in which you may write"),
            (errno.EROFS, r"Read-only.*in which you may write"),
        ],
    )
    def test_disks_that_take_nothing(
        self, number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OutputError, match=message):
            write_file(tmp_path / "model.pte", b"program")
        assert not list(tmp_path.iterdir())

    def test_folders_in_place_of_files(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"it is a folder\. Give a path of a file in it"):
            write_file(tmp_path, b"program")
        with pytest.raises(InputError, match=r"Is a directory\. Give a file in it"):
            read_file(tmp_path)
        with pytest.raises(HostError, match=r"Is a directory\. Give a file in it"):
            load(tmp_path)
        with pytest.raises(HostError, match=r"load.. takes the path or the bytes of a .pte, not a list"):
            load([])  # type: ignore[arg-type]

    def test_a_converter_that_is_missing(self) -> None:
        with pytest.raises(ConverterError, match=r"eIQ PyPI.*NXP eIQ Neutron Backend"):
            sdk.choose_converter(None, [])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_profilling": True}, "Did you mean 'use_profiling'"),
            ({"use_profiling": "yes"}, "True or False"),
            ({"neutron_converter_flavor": 25}, "text or None"),
            ({"neutron_converter_flavor": "25_06"}, "SDK_25_06"),
            ({"operators_not_to_delegate": "aten::add"}, "list of names"),
            ({"operators_not_to_delegate": 3}, "list of names"),
            ({"operators_not_to_delegate": [3]}, "names, not 3"),
            ({"extra_flags": 1}, "text or None"),
        ],
    )
    def test_options_of_lower(self, options: dict[str, Any], message: str) -> None:
        module = convert(seeded(small), (image(),))
        with pytest.raises(OptionError, match=message):
            lower(module, (image(),), **options)

    @pytest.mark.parametrize(
        "options", [{"weight_granularity": "channel"}, {"observer": 3}, {"is_qat": True}, {"weight_granularit": 1}]
    )
    def test_options_of_quantize(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            quantize(seeded(small), (image(),), [image()], **options)

    @pytest.mark.parametrize("spec", [None, "imxrt700", [3], 3])
    def test_partitioner_without_a_compile_spec(self, spec: Any) -> None:
        with pytest.raises(OptionError, match="generate_neutron_compile_spec"):
            NeutronPartitioner(spec)

    def test_partitioner_for_another_target(self) -> None:
        with pytest.raises(OptionError, match="'imxrt700', but the partitioner is for 'imx95'"):
            NeutronPartitioner(generate_neutron_compile_spec("imxrt700"), "imx95")

    @pytest.mark.parametrize("path", ["missing/model.pte", "folder", "file/model.pte"])
    def test_output_that_cannot_be_written(self, path: str, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        program = lower(quantize(seeded(small), (image(),), [image()]))
        with pytest.raises(OutputError, match=f"Cannot write '{tmp_path / path}'.*Give a path"):
            program.save(tmp_path / path)
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]

    def test_saving_replaces_the_file(self, tmp_path: Path) -> None:
        program = lower(quantize(seeded(small), (image(),), [image()]))
        path = tmp_path / "model.pte"
        path.write_bytes(b"old")
        program.save(path)
        assert path.read_bytes() == program.buffer
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.pte"]
        assert torch.equal(flat(load(path).run(image()))[0], flat(program.run(image()))[0])

    def test_every_error_is_an_open_neutron_error(self) -> None:
        from openneutron import errors

        for name in errors.__all__:
            assert issubclass(getattr(errors, name), OpenNeutronError)
