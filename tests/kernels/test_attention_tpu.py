"""The kernels for TPUs: their program on a host. `test_aot.py` compiles them for the chips."""

import pytest

from tests.kernels import qkv


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T, extra, tile", [(7, 0, 128), (130, 9, 128)])
def test_tiles_are_the_reference(causal, T, extra, tile):
  qkv.tiles_are_the_reference("tpu", causal=causal, T=T, extra=extra, tile=tile)
