"""Every family, whole or by adapters, by a method of each kind: train, resume, export, reload, the same samples."""

from __future__ import annotations

import pytest

from fewstep.pipelines.check import difference, differences
from tests.pipelines.matrix import METHODS, Teacher, limit, needs_fewstep
from tests.tiny_pipelines import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
FEW = [("dit", "two_time", False), ("sd3", "dmd2", True), ("sana", "consistency", False), ("wan", "two_time", True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_family_makes_the_same_samples_in_another_process(tmp_path, name):
    teacher = Teacher.saved(name, tmp_path)
    exports = [
        teacher.exported(method, lora, tmp_path / f"{method}-{lora}") for lora in (False, True) for method in METHODS
    ]
    for one, figure in zip(exports, differences(exports), strict=True):
        assert figure <= limit(one), one.out
    fresh = name == "playground"  # which EDM's own schedulers do not draw between steps
    assert [needs_fewstep(one) for one in exports] == 2 * [fresh, fresh, True]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("name", "method", "lora"), FEW)
def test_a_few_cells_of_the_matrix(tmp_path, name, method, lora):
    one = Teacher.saved(name, tmp_path).exported(method, lora, tmp_path / "cell")
    assert difference(one.out, one.student, one.sampler) <= limit(one)
