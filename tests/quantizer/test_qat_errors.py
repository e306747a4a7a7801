"""Models that cannot be trained are rejected with a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.flow_support import lower_documented
from tests.models import Model, bn, conv, image
from tests.qat_support import BATCH, operators, prepared, train
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, quantize
from openneutron.errors import CalibrationError, InputError, ModelError, OptionError


class TestErrors:
    def refuse(self, model: nn.Module, message: str, shape: tuple[int, ...] = (4, 8, 8)) -> ModelError:
        with pytest.raises(ModelError, match=message) as error:
            prepared(model, shape)
        return error.value

    def test_batch_norm_without_statistics(self) -> None:
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        assert self.refuse(nn.Sequential(conv(), norm), "track_running_stats=True").node == "batch_norm"

    def test_batch_norm_that_nothing_takes(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(F.relu(x), m.mean, m.variance, training=True)

        model = Model(function, mean=torch.zeros(4), variance=torch.ones(4))
        error = self.refuse(model, r"no operator before it.*eval\(\)", (4, 2, 2, 2, 2))
        assert error.op == "aten.batch_norm.default"

    def test_batch_norm_with_parameters_from_inputs(self) -> None:
        def function(m: Any, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(m.c(x), m.mean, m.variance, weight=x.mean((0, 2, 3)), training=True)

        model = Model(function, c=conv(), mean=torch.zeros(4), variance=torch.ones(4))
        self.refuse(model, "computed from inputs")

    def test_random_numbers(self) -> None:
        error = self.refuse(Model(lambda m, x: m.c(x) * torch.rand_like(x), c=conv()), r"random numbers.*eval\(\)")
        assert error.op == "aten.rand_like.default"
        assert error.source is not None

    def test_sizes_that_must_be_fixed(self) -> None:
        """Attention over a dynamic number of steps."""
        model = Model(lambda m, x: m.layer(m.c(x).mean(1)), c=conv(), layer=nn.TransformerEncoderLayer(8, 2, 8))
        assert self.refuse(model, "Export without dynamic_shapes").op == "aten.matmul.default"
        example = image(BATCH, 4, 8, 8)
        static = torch.export.export(model.train(), (example,)).module()
        module = train(prepare_qat_pt2e(static, NeutronQuantizer(is_qat=True)))
        assert lower_documented(convert_pt2e(module), (example,)).cpu == []

    @pytest.mark.parametrize(
        ("function", "op"),
        [
            (
                lambda m, x: x.scatter_reduce(1, (m.c(x) > 0).long()[:, :4], x, "amax"),
                "aten.scatter_reduce.two",
            ),
            (lambda m, x: m.c(x).sort(1)[0], "aten.sort.default"),
        ],
    )
    def test_operators_without_a_kernel(self, function: Callable[[Any, torch.Tensor], torch.Tensor], op: str) -> None:
        """With a dynamic batch and without."""
        error = self.refuse(Model(function, c=conv()), "neither on the NPU nor on the CPU")
        assert (error.op, error.source is None) == (op, False)
        static = torch.export.export(Model(function, c=conv()).train(), (image(BATCH, 4, 8, 8),)).module()
        with pytest.raises(ModelError, match="neither on the NPU nor on the CPU"):
            prepare_qat_pt2e(static, NeutronQuantizer(is_qat=True))

    def test_an_operator_on_parameters_needs_no_kernel(self) -> None:
        class Sorted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.offset = nn.Parameter(torch.rand(4, 1, 1))
                self.conv = conv()

            def forward(self, x: torch.Tensor) -> Any:
                return self.conv(x) + self.offset.sort(0)[0]

        prepared(Sorted())

    def test_writes(self) -> None:
        self.refuse(Model(lambda m, x: m.c(x[:1].add_(1)), c=conv()), "writes in place")

    def test_parameters_that_would_be_constants(self) -> None:
        class Divides(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.temperature = nn.Parameter(torch.tensor(2.0))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x / self.temperature

        self.refuse(Divides(), r"'temperature'.*requires_grad_\(False\)")
        frozen = Divides().requires_grad_(False)
        module = prepared(nn.Sequential(conv(), frozen))
        assert operators(convert_pt2e(train(module)))["aten.mul.Tensor"] == 1

    def test_conversion_without_training_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match="never reached"):
            convert_pt2e(prepared(conv()))

    def test_training_that_diverges(self) -> None:
        module = prepared(nn.Sequential(conv(), bn()))
        with pytest.raises(CalibrationError, match="NaN or infinite") as error:
            module(image(BATCH, 4, 8, 8) * float("inf"))
        assert error.value.node is not None

    def test_inputs_of_another_shape(self) -> None:
        module = prepared(nn.Sequential(conv(), bn()))
        for bad in (image(BATCH, 4, 9, 9), image(4, 8, 8), image(BATCH, 4, 8, 8).double()):
            with pytest.raises(InputError, match=r"exported for torch.float32 \(any, 4, 8, 8\)"):
                module(bad)

    @pytest.mark.parametrize("prepare", [prepare_pt2e, prepare_qat_pt2e])
    def test_a_quantizer_that_does_not_train(self, prepare: Callable[..., Any]) -> None:
        module = torch.export.export(nn.Sequential(conv(), nn.Dropout()).train(), (image(),)).module()
        with pytest.raises(ModelError, match=r"train mode.*NeutronQuantizer\(is_qat=True\)"):
            prepare(module, NeutronQuantizer())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"observer": 3, "is_qat": True}, "observer takes a class"),
            ({"weight_bits": 9}, "from 2 to 8"),
            ({"weight_bits": 4.5}, "from 2 to 8"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            NeutronQuantizer(**options)

    def test_quantize_refuses_the_option_is_qat(self) -> None:
        with pytest.raises(OptionError, match="prepare_qat_pt2e"):
            quantize(conv().eval(), (image(),), [image()], is_qat=True)


@pytest.mark.parametrize("bad", [3.0, None, "a", [1.0], torch.ones(BATCH, 4, 8, 8, dtype=torch.int64)])
def test_an_input_that_is_not_a_float_tensor(bad: object) -> None:
    module = prepared(nn.Sequential(conv(), nn.ReLU()))
    with pytest.raises(InputError, match=r"the model was exported for torch.float32 \(any, 4, 8, 8\)"):
        module(bad)
    module(image(BATCH, 4, 8, 8))


def test_an_observer_that_an_input_shares_with_values_of_other_shapes() -> None:
    module = prepared(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 2)))
    module(image(BATCH, 4, 8, 8))
    with pytest.raises(InputError, match="exported for"):
        module(2)
