"""The tolerance rule and the launch counter themselves."""

import math
import threading

import pytest
import torch

from atman_triton.testing import assert_close_to_oracle

ORACLE = torch.linspace(-1, 1, 50, dtype=torch.float64)


def test_an_error_like_eager_passes_and_both_are_printed(capsys):
    assert_close_to_oracle(ORACLE.float() + 1e-4, ORACLE.float() - 1e-4, ORACLE)
    assert "error 1.000e-04, eager 1.000e-04" in capsys.readouterr().out


def test_three_times_the_error_of_eager_fails():
    with pytest.raises(AssertionError, match=r"output: error 3\.0\d+e-04, eager 1\.0\d+e-04"):
        assert_close_to_oracle(ORACLE.float() + 3e-4, ORACLE.float() - 1e-4, ORACLE)
    assert_close_to_oracle(ORACLE.float() + 3e-4, ORACLE.float() - 1e-4, ORACLE, factor=3.1)


def test_a_perfect_eager_leaves_room_for_rounding_only():
    half = ORACLE.half()
    assert_close_to_oracle(half, half, half.double())
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(half + 4e-3, half, half.double())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_never_passes(place):
    tensors = [ORACLE.float(), ORACLE.float(), ORACLE.clone()]
    tensors[place] = tensors[place].clone()
    tensors[place][3] = math.nan
    with pytest.raises(AssertionError, match="holds 1 NaN"):
        assert_close_to_oracle(*tensors)


def test_infinities_must_agree():
    oracle = ORACLE.clone()
    oracle[0] = -math.inf
    assert_close_to_oracle(oracle.float(), oracle.float(), oracle)
    for actual in (ORACLE, -oracle):
        with pytest.raises(AssertionError, match="infinite in different places"):
            assert_close_to_oracle(actual.float(), oracle.float(), oracle)


def test_shapes_and_oracle_dtype_are_checked():
    with pytest.raises(AssertionError, match="shapes of actual, eager and oracle differ"):
        assert_close_to_oracle(ORACLE[:1], ORACLE, ORACLE)
    with pytest.raises(AssertionError, match=r"must be float64, got torch\.float32"):
        assert_close_to_oracle(ORACLE, ORACLE, ORACLE.float())


class TestCountLaunches:
    @pytest.fixture(autouse=True)
    def _kernels(self):
        pytest.importorskip("triton", reason="counts launches of Triton kernels")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.query = torch.randn(1, 1, 3, 16, device=device)

    def call(self, **options):
        from atman_triton.kernels.forward import attention_fwd

        return attention_fwd(self.query, self.query, self.query, **options)

    def test_real_launches_are_counted_and_only_inside(self):
        from atman_triton.testing import count_launches

        self.call()
        with count_launches() as outer:
            self.call()
            with count_launches() as inner:
                self.call(key_factor=torch.ones_like(self.query[:, 0, :, 0]), mode="min_shift")
        self.call()
        assert (outer.attention, inner.attention) == (2, 1)
        assert inner["_factor_tiles_kernel"] == 1

    def test_a_launch_that_fails_is_not_counted(self):
        from atman_triton.testing import count_launches

        with count_launches() as launches, pytest.raises(Exception, match=r"."):
            self.call(mode="min_shift", key_factor="not a tensor")
        assert launches.attention == 0

    def test_other_threads_are_counted(self):
        from atman_triton.testing import count_launches

        with count_launches() as launches:
            thread = threading.Thread(target=self.call)
            thread.start()
            thread.join()
        assert launches.attention == 1

    def test_a_kernel_that_disappeared_is_an_error(self, monkeypatch):
        from atman_triton.kernels import forward
        from atman_triton.testing import count_launches

        monkeypatch.delattr(forward, "_attention_fwd_kernel")
        with pytest.raises(LookupError, match="has no kernel _attention_fwd_kernel"):
            count_launches().__enter__()
