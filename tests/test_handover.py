"""Nothing is lost between the two paths, and who reads keeps what it took."""

import threading

from pixelis_jax.handover import Inbox, Published
from tests.episodes import experience, unlabelled


def test_what_is_published_is_served_and_replaces_nothing_that_was_taken():
  first = {"w": 1, "still": 5}
  published = Published(3, first, serve=lambda params: {"w": 10 * params["w"]})
  taken = published.latest()
  published.publish(4, {"w": 2})
  assert taken == (3, {"w": 1, "still": 5}) and published.latest() == (4, {"w": 20, "still": 5})


def test_the_inbox_hands_out_batches_and_what_is_left_after_closing(policy):
  inbox = Inbox()
  waiting = [experience(policy, unlabelled("a"), {0}, id=str(i)) for i in range(3)]
  taken = []
  reader = threading.Thread(target=lambda: taken.append(inbox.take(2)))
  reader.start()
  inbox.put(waiting[0])
  reader.join(0.05)
  assert reader.is_alive()  # One is no batch of two.
  inbox.put(waiting[1])
  reader.join(5.0)
  assert [e.id for e in taken[0]] == ["0", "1"]
  inbox.put(waiting[2])
  inbox.close()
  assert [e.id for e in inbox.take(2)] == ["2"]
  assert inbox.take(2) is None
