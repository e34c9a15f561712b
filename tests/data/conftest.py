import pytest

from pixelis_jax.tools import Toolbox


@pytest.fixture
def toolbox() -> Toolbox:
  """zoom_in for a policy that sees everything at 80x80."""
  return Toolbox(["zoom_in"], shown_size=lambda height, width: (80, 80))
