"""memory/index.py: ScaNN and its exact twin return the same, after any sequence of changes."""

import threading

import numpy as np
import pytest

from pixelis_jax.memory.index import ExactIndex, Index, ScannIndex, make_index

DIM = 24
pytest.importorskip("scann", reason="ScaNN has wheels for x86-64 Linux only")


def unit(n, dim=DIM, *, seed=0):
  vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ids(*values):
  return np.array(values, np.int64)


def by_hand(stored, query, k):
  """float64 cosine over a dict id -> vector."""
  scored = sorted(((-float(v.astype(np.float64) @ query), i) for i, v in stored.items()))
  return [i for _, i in scored[:k]], [-s for s, _ in scored[:k]]


@pytest.fixture(params=["exact", "scann"])
def index(request):
  made = make_index(DIM, request.param)
  yield made
  made.close()


def test_neighbours_are_the_definition_after_adds_and_removals(index):
  vectors, stored = unit(300), {}
  rng = np.random.default_rng(1)
  for start in range(0, 300, 60):
    batch = np.arange(start, start + 60)
    index.add(batch * 7, vectors[batch])  # ids are not positions
    stored |= {int(i) * 7: vectors[i] for i in batch}
    gone = rng.choice(sorted(stored), 20, replace=False)
    index.remove(gone)
    for i in gone.tolist():
      del stored[i]
    queries = unit(5, seed=start + 2)
    found, similarities = index.search(queries, 9)
    for q in range(5):
      expected, scores = by_hand(stored, queries[q], 9)
      assert found[q].tolist() == expected
      # float32 sums of 24 products of numbers below 1: a few 1e-7.
      np.testing.assert_allclose(similarities[q], scores, atol=1e-6)
  assert len(index) == len(stored) == 200


def test_both_return_the_same_bits():
  exact, scann = ExactIndex(DIM), ScannIndex(DIM)
  for each in (exact, scann):
    each.add(np.arange(500), unit(500))
    each.remove(np.arange(0, 500, 3))
  queries = unit(20, seed=5)
  for a, b in zip(exact.search(queries, 12), scann.search(queries, 12), strict=True):
    np.testing.assert_array_equal(a, b)
  scann.close()


def test_a_fresh_insert_finds_itself_at_once(index):
  index.add(np.arange(50), unit(50))
  # Unlike anything there: the direction that a trained partition would lose.
  outlier = -unit(50).mean(axis=0)
  outlier /= np.linalg.norm(outlier)
  index.add(ids(1000), outlier[None, :])
  found, similarities = index.search(outlier[None, :], 1)
  assert found.tolist() == [[1000]]
  np.testing.assert_allclose(similarities, [[1.0]], atol=1e-6)


def test_empty_and_fewer_than_k(index):
  found, similarities = index.search(unit(2), 5)
  assert found.shape == similarities.shape == (2, 0)
  index.add(ids(4, 2), unit(2))
  found, similarities = index.search(unit(2), 5)
  assert found.tolist() == [[4, 2], [2, 4]]
  assert similarities.shape == (2, 2) and not np.isnan(similarities).any()
  index.remove(ids(2, 4))
  assert index.search(unit(1), 5)[0].shape == (1, 0)
  index.add(ids(), np.zeros((0, DIM), np.float32))
  assert len(index) == 0


def test_equal_similarities_come_by_ascending_id(index):
  same = np.repeat(unit(1), 40, axis=0)
  order = np.random.default_rng(0).permutation(40)
  index.add(order, same)
  index.add(np.arange(100, 160), unit(60, seed=3))
  # 40 ties, k 3: whatever comes first inside, the three smallest ids are returned.
  assert index.search(same[:1], 3)[0].tolist() == [[0, 1, 2]]
  index.remove(ids(0, 2))
  assert index.search(same[:1], 3)[0].tolist() == [[1, 3, 4]]


def test_what_is_wrong_is_named_and_changes_nothing(index):
  index.add(ids(1, 2), unit(2))
  with pytest.raises(ValueError, match="id 2 is already in the index"):
    index.add(ids(3, 2), unit(2, seed=1))
  with pytest.raises(ValueError, match="id 5 is already"):
    index.add(ids(5, 5), unit(2, seed=1))
  with pytest.raises(ValueError, match=f"vectors have 7 dimensions, this index has {DIM}"):
    index.add(ids(3), unit(1, 7))
  with pytest.raises(ValueError, match=f"queries have 7 dimensions, this index has {DIM}"):
    index.search(unit(1, 7), 1)
  with pytest.raises(
    ValueError, match=r"vectors\[1\] has norm 2(.0+1?)?, it must be a unit vector"
  ):
    index.add(ids(3, 4), unit(2) * np.array([[1], [2]], np.float32))
  with pytest.raises(ValueError, match=r"vectors\[0\] has norm nan"):
    index.add(ids(3), np.full((1, DIM), np.nan, np.float32))
  with pytest.raises(ValueError, match=r"not in the index \[9\]"):
    index.remove(ids(1, 9))
  with pytest.raises(ValueError, match="named twice"):
    index.remove(ids(1, 1))
  with pytest.raises(ValueError, match="k 0 must be at least 1"):
    index.search(unit(1), 0)
  # After all of it both entries are there under their own ids, and only they.
  assert index.search(unit(2), 2)[0].tolist() == [[1, 2], [2, 1]]


def test_an_id_can_return_with_another_vector(index):
  first, second = unit(2)
  index.add(ids(1, 8), np.stack([first, unit(1, seed=9)[0]]))
  index.remove(ids(1))
  index.add(ids(1), second[None, :])
  assert index.search(second[None, :], 1)[0].tolist() == [[1]]
  np.testing.assert_allclose(index.search(second[None, :], 1)[1], [[1.0]], atol=1e-6)


def test_backends():
  with pytest.raises(ValueError, match="\"faiss\".*|'faiss'"):
    make_index(4, "faiss")
  assert isinstance(make_index(4, "exact"), ExactIndex)
  auto = make_index(4)
  assert isinstance(auto, ScannIndex) and isinstance(auto, Index)
  auto.close()


def test_without_scann_auto_is_exact_and_scann_says_what_to_do(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "scann", None)
  assert isinstance(make_index(4), ExactIndex)
  with pytest.raises(ImportError, match='use "exact" here'):
    make_index(4, "scann")


def test_tree_is_swapped_in_and_keeps_up():
  vectors, fresh = unit(3000, seed=1), unit(60, seed=2)
  index = ScannIndex(DIM, tree_threshold=2000)
  index.add(np.arange(3000), vectors)
  index.add(np.arange(5000, 5030), fresh[:30])  # Perhaps while it is built.
  index.remove(np.arange(0, 100))
  index.wait()
  assert index.has_tree
  index.add(np.arange(6000, 6030), fresh[30:])
  # Every entry finds itself: from the tree, added while it was built, and added since.
  alive = np.concatenate([np.arange(100, 3000, 29), np.arange(5000, 5030), np.arange(6000, 6030)])
  queries = np.concatenate([vectors[100:3000:29], fresh])
  np.testing.assert_array_equal(index.search(queries, 1)[0][:, 0], alive)
  # Removed ones never come back, whether the tree held them or not.
  index.remove(ids(5000, 6000, 250))
  found, _ = index.search(np.concatenate([vectors[:100], vectors[250:251], fresh[[0, 30]]]), 10)
  assert not np.isin(found, np.concatenate([np.arange(100), ids(5000, 6000, 250)])).any()
  assert found.shape == (103, 10)
  # An id that returned with another vector is found by the new one though the tree has the old.
  index.add(ids(250), unit(1, seed=77))
  assert index.search(unit(1, seed=77), 1)[0].tolist() == [[250]]
  assert index.search(vectors[250:251], 1)[0][0, 0] != 250
  # Recall of the true ten on unclustered data, the tree's worst case, searching a quarter of its
  # leaves: those ranked by likelihood hold more than twice their share. Shifted ids give about 0.
  exact = ExactIndex(DIM)
  keep = [i for i in range(100, 3000) if i != 250]
  exact.add(np.array(keep), vectors[keep])
  queries = unit(50, seed=4)
  truth, near = exact.search(queries, 10)[0], index.search(queries, 10)[0]
  recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, near, strict=True)])
  assert recall > 0.5
  index.close()


def test_a_tree_is_rebuilt_when_most_of_it_is_gone():
  vectors = unit(900, seed=1)
  index = ScannIndex(DIM, tree_threshold=400)
  index.add(np.arange(900), vectors)
  index.wait()
  index.remove(np.arange(500))
  index.wait()
  assert len(index._tree.docids) == 400  # Only what is alive.
  found, _ = index.search(vectors[500:510], 1)
  assert found[:, 0].tolist() == list(range(500, 510))
  index.close()


def test_threads_may_search_while_one_adds(index):
  vectors, wrong = unit(400), []

  def search():
    for _ in range(40):
      found, similarities = index.search(vectors[:1], 3)
      if not (found[0, 0] == 0 and np.all(np.diff(similarities[0]) <= 0)):
        wrong.append(found)

  index.add(ids(0), vectors[:1])
  threads = [threading.Thread(target=search) for _ in range(3)]
  for thread in threads:
    thread.start()
  for i in range(1, 400):
    index.add(ids(i), vectors[i : i + 1])
  for thread in threads:
    thread.join()
  assert not wrong and len(index) == 400
