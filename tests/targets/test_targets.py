from __future__ import annotations

from typing import Any

import pytest

from openneutron import NeutronTargetSpec
from openneutron.errors import OptionError, TargetError
from openneutron.targets import ASSUMED_MACS_PER_PIPELINE, TARGETS, Generation, HardwareVersion, generation_of_flavor

LEGACY, MODERN = Generation.LEGACY, Generation.MODERN
FACTS: tuple[tuple[str, str | None, str, int | None, HardwareVersion | None], ...] = (
    ("mcxn94x", "N1-16", "Neutron-C", 16, HardwareVersion.N1),
    ("mcxn54x", "N1-16", "Neutron-C", 16, HardwareVersion.N1),
    ("imxrt700", "N3-64", "Neutron-C", 64, HardwareVersion.N3),
    ("imx95", "N3-1024S", "Neutron-S", 1024, HardwareVersion.N3),
    ("imx943", None, "Neutron-S", None, None),
    ("imx952", None, "Neutron-S", None, None),
    ("s32n79", None, "Neutron-S", None, None),
    ("s32k5", None, "Neutron-C", None, None),
)
"""The name, the NPU, its class, its MACs per cycle and its hardware version of each chip in the fact sheet."""


@pytest.mark.parametrize(
    ("flavor", "generation"),
    [
        (None, MODERN),
        ("SDK_25_03", LEGACY),
        ("SDK_25_06", LEGACY),
        ("SDK_25_09", LEGACY),
        ("SDK_25_12", LEGACY),
        ("SDK_26_03", MODERN),
        ("3.0.0", LEGACY),
        ("3.1.1", LEGACY),
        ("3.1.3", MODERN),
        ("3.2.0", MODERN),
        ("3.10.0", MODERN),
    ],
)
def test_generation_of_flavor(flavor: str | None, generation: Generation) -> None:
    assert generation_of_flavor(flavor) is generation


@pytest.mark.parametrize("flavor", ["", "SDK_25", "25_06", "SDK_25_06 ", "3.1", "latest", "SDK_2025_06"])
def test_unknown_flavors(flavor: str) -> None:
    with pytest.raises(OptionError, match=r"SDK_25_06.*3\.1\.3"):
        generation_of_flavor(flavor)


def test_all_targets_of_the_fact_sheet() -> None:
    assert set(TARGETS) == {name for name, *_ in FACTS}
    assert all(name == target.name for name, target in TARGETS.items())


@pytest.mark.parametrize(("name", "npu", "neutron_class", "macs", "version"), FACTS)
def test_facts(
    name: str, npu: str | None, neutron_class: str, macs: int | None, version: HardwareVersion | None
) -> None:
    spec = NeutronTargetSpec(name)
    target = spec.neutron_target
    assert (target.npu, target.neutron_class, target.macs_per_cycle) == (npu, neutron_class, macs)
    assert spec.get_hw_version() == version
    assert spec.is_subsystem() == (neutron_class == "Neutron-S")
    assert (spec.name, spec.get_name()) == (name, name)


def test_pipelines_times_macs_is_the_whole() -> None:
    spec = NeutronTargetSpec("imxrt700")
    assert (spec.get_num_pipes(), spec.get_num_macs()) == (8, 8)
    assert spec.neutron_target.channel_granularity == 8


def test_unknown_numbers_are_marked_and_assumed_strictly() -> None:
    spec = NeutronTargetSpec("imx943")
    assert "macs_per_cycle=unknown" in repr(spec)
    assert spec.get_num_pipes() is None
    assert spec.neutron_target.channel_granularity == ASSUMED_MACS_PER_PIPELINE
    assert "unknown" not in repr(spec).replace("=unknown", "")


@pytest.mark.parametrize("name", ["imxrt800", "", "IMXRT700", None, 3, ["imxrt700"]])
def test_unknown_targets_list_the_known_ones(name: Any) -> None:
    with pytest.raises(TargetError, match="Known targets: " + ", ".join(TARGETS)):
        NeutronTargetSpec(name)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(TargetError, match="Did you mean 'imxrt700'"):
        NeutronTargetSpec("imxrt70")


def test_a_spec_of_a_spec_is_equal() -> None:
    spec = NeutronTargetSpec("imx95")
    assert NeutronTargetSpec(spec) == spec
    assert hash(NeutronTargetSpec(spec)) == hash(spec)
    assert spec != NeutronTargetSpec("imx952")
