import operator

from pixelis_jax.data.mixture import Mixture
from pixelis_jax.tools import Toolbox


def test_a_call_is_made_again_after_what_it_followed(load_benchmark):
  """The mask that GET_PROPERTIES measures is that of the call before; without it there is none."""
  throughput = load_benchmark("throughput")
  names = ("zoom_in", "segment_object_at", "get_properties")
  toolbox = Toolbox(names, shown_size=lambda h, w: (h, w), compute=operator.call)
  made = list(throughput.calls(Mixture(split="stream", seed=1, kinds=("shape",)), 1, toolbox))
  assert [one.call.name for one in made] == [*names]
  again = [toolbox.run(one.call, one.task, one.results) for one in made]
  assert again[1].text == made[2].results[1].text
  assert [result.error for result in again] == [None] * 3
  assert toolbox.run(made[2].call, made[2].task, ()).error is not None


def test_every_way_is_measured_in_calls_a_second(load_benchmark, monkeypatch):
  """Four calls that take 2 s and then 1, 4 and 2 s; the first pass starts the workers."""
  throughput = load_benchmark("throughput")
  spent = iter([2.0, 1.0, 4.0, 2.0])
  monkeypatch.setattr(throughput, "seconds", lambda made, toolbox, threads: next(spent))
  assert throughput.measure([None] * 4, {"alone": (None, 1)}, 3) == {"alone": [2.0, 1.0, 4.0]}
