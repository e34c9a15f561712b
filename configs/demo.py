"""The online loop on the embedded model and a stream of a shifted domain: what `make demo` runs.

    python -m pixelis_jax.online --config=configs/demo.py:dim --workdir=runs/demo

The argument is the shift, with "-skewed" behind it for a stream of which 60% has one answer, and
with "/KIND", or "/KIND+KIND", for questions of these kinds (data.mixture.KINDS) alone, such as
"dim/color". Or "own" for a model of your own, whose turns, images and updates are larger than the
embedded one's; or "text" for one of your own that only reads: its samples vote (TTRL's rule), and
its questions come from files: --config.requests, and --config.X.file for X of shifted, original,
probe.tasks. Or a released model with images (common.SIZES), as "own" on all devices of a slice.
"""

from ml_collections import ConfigDict

from configs import common

SHIFTS = ("rotate", "dim", "invert", "noise", "blur", "writers", "static")
RELEASED = tuple(size for size in common.SIZES if "vl" in size)
OWN = ("own", "text", *RELEASED)
OPTIONS = ("", "debug", *OWN, *SHIFTS, *(f"{shift}-skewed" for shift in SHIFTS))


def get_config(arg: str = "") -> ConfigDict:
  arg, _, named = arg.partition("/")
  kinds = tuple(named.split("+")) if named else ()
  if arg not in OPTIONS or (kinds and arg in OWN):
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}, /KIND behind a shift")
  if unknown := [kind for kind in kinds if kind not in (*common.DIGITS, *common.PUZZLES)]:
    raise ValueError(f"kinds {unknown} must be some of {(*common.DIGITS, *common.PUZZLES)}")
  shift, _, skewed = (arg if arg not in ("", "debug", *OWN) else "dim").partition("-")
  c = ConfigDict()
  c.seed = 0
  c.model = common.trained()
  c.model.freeze = ("text",)  # What is seen has changed, not what is asked and said of it.
  c.model.rows_multiple = 16
  c.limits = common.limits()
  c.mesh = common.mesh()
  c.mesh.data = 1
  c.stream = common.scenes("stream", shift, n=384)
  c.stream.seed = 2000 + c.get_ref("seed")  # Other seeds are other requests.
  c.stream.skew = 8 if skewed else -1
  c.requests = ""  # A JSON or JSONL file of requests in place of the stream.
  # What is read of each of their videos; pixels are of a frame. See data.video.Budget.
  c.video = ConfigDict({"fps": 2.0, "max_frames": 768, "max_pixels": 768 * 32**2})
  c.shifted = common.questions("held_out", shift, n=400, seed=3000)
  c.original = common.questions("held_out", "none", n=400, seed=3000)
  c.baseline = True  # Also learn by plain majority vote from the same stream, to compare.
  c.arrivals = 16  # Requests that arrive together.
  # When the next requests arrive: when learning is near ("learner"), at once ("none"), or when all
  # has been learned that makes up an update, in the thread that answers ("lockstep"). Then a run is
  # a function of its seed, and may be one of several processes.
  c.pace = "learner"
  c.samples = 6
  c.temperature = 1.0
  c.vote = ConfigDict()
  # Who votes, in any combination: "views" (the reference, once a view), "samples" (the policy's
  # own), "memory" (what was voted on similar requests).
  c.vote.voters = ("views", "memory")
  c.vote.rule = "entropy_weighted"
  c.vote.verifier = "equal"  # Of algo.verifiers: which answers count as one.
  c.vote.entropy_temperature = 0.5  # Nats over the last turn at which a voter weighs 1/e.
  c.vote.view_temperature = 0.1  # Nats that a view tells less than the best where it weighs 1/e.
  c.vote.trust_half = 0.1  # Nats: voters whose best tells this little are half believed; 0: fully.
  # What an old request keeps at each new one: in which answers come up, and in what views tell, as
  # what is asked may change at any time. About 100 and 20 are remembered.
  c.vote.decay, c.vote.view_decay = 0.99, 0.95
  c.gate = ConfigDict({"confidence": 0.7, "margin": 0.3, "votes": 1})  # Ballots with an answer.
  c.gate.clearer = True  # Only votes that a view is for which tells more than the plain look.
  # Of the latest requests, how many are judged again once a view is clearer that was not when they
  # were asked: as far back as they were like those of now; 0: none.
  c.hindsight = 400
  # Where votes on the same question, or one as similar, differ from visit to visit, a vote is
  # believed less: by up to `weight`; 0: not. `visits` are looked for among the nearest entries.
  c.guard = ConfigDict({"weight": 0.0, "similarity": 0.999, "visits": 8})
  c.calibration = ConfigDict()
  c.calibration.method = "none"  # Or isotonic, platt: how often votes are right on these questions,
  # which have labels, and are none of the stream's.
  c.calibration.tasks = common.questions("stream", "none", n=384, seed=5000)
  c.memory = ConfigDict()
  c.memory.backend = "auto"
  c.memory.capacity = 100_000
  c.memory.embedding_size = 0  # 0: keys from the model; else requests bring vectors this long.
  c.memory.k = 8
  c.memory.weight = 0.25  # Of a neighbour with the same key that was fully believed.
  c.memory.bandwidth = 0.05
  c.learn = ConfigDict()
  # Of the devices behind those of `mesh`; data 0: the same ones, on which what learns lies in other
  # parts where fsdp or tensor say so.
  c.learn.mesh = common.mesh()
  c.learn.mesh.data = 0
  c.learn.requests = 6  # New experiences an update.
  # And so many that were read before, by (share of samples that disagreed) ** alpha, of the latest.
  c.learn.replay = ConfigDict({"experiences": 6, "capacity": 1024, "alpha": 0.0})
  c.learn.samples = 0  # Of an experience, drawn by chance, that learn; the others vote; 0: all.
  c.learn.reward = common.pseudo_reward()
  c.learn.contrast = 2  # Samples an experience that enter an update: of the best and the worst.
  c.learn.corrections = 1  # Of these samples, shown with the voted answer also.
  c.learn.correction_weight = 10.0  # Of their advantage: the share of samples that disagree.
  # Steps behind each update, of the tower alone, towards what views showed that tell more than the
  # plain look, in `pairs` of the latest; 0: answers alone teach. And so many `held` pictures of the
  # probe a step, each with that weight. In place of up to `copies` of the pairs come pictures of
  # the probe, shown as their view would clear up: those of views that can be undone.
  c.learn.look = ConfigDict({"updates": 6, "pairs": 32, "copies": 16, "capacity": 256, "lr": 1e-3})
  c.learn.look.held, c.learn.look.weight = 64, 1.0
  c.learn.look.muon_scale = 3.3  # Of lr, for the layers' matrices, moved by Muon; at 0 AdamW.
  c.learn.max_tokens = 128  # Rows that are longer, or have images of more patches, are left out of
  c.learn.max_patches = 64  # an update, so that all have one shape.
  c.learn.rows_multiple = 32
  c.learn.accumulate = 1  # Parts of an update that are computed one after the other.
  c.learn.lr = 3e-4
  c.learn.lr_rule = "fixed"  # Or "confidence": clip(lr (1 - c), lr_min, lr), c that of the votes.
  c.learn.lr_min = 1e-6
  c.learn.warmup = 8  # Updates until lr.
  c.learn.per_minute = 0  # Updates in any minute, the others wait; 0: as many as come.
  c.learn.per_question = 0  # Visits to one question that teach; 0: all.
  c.learn.b1, c.learn.b2 = 0.9, 0.99
  c.learn.mu_dtype = "float32"
  c.learn.weight_decay = 0.0
  c.learn.clip_norm = 1.0
  c.learn.patch_scale = 0.1
  c.learn.loss = common.objective()
  # k3's gradient explodes where the policy forgets what the reference said, and ends soon after;
  # k2's grows with the distance, to either side.
  c.learn.loss.kl_loss_type = "k2"
  c.learn.adv_estimator = "dr_grpo"
  c.learn.publish_every = 4
  c.learn.ema = 0.8  # 0.999 over 6,000 updates, scaled to a run of about 30.
  # Within `tolerance` of the target the coefficient stays; beyond the limit an update is refused.
  c.kl = ConfigDict({"coef": 0.1, "target": 0.05, "tolerance": 0.0, "horizon": 5.0, "limit": 0.5})
  c.probe = ConfigDict()
  c.probe.tasks = common.questions("stream", "none", n=384, seed=4000)
  c.probe.canary = 96  # Of the probe's tasks; the others are rehearsed.
  c.probe.tolerance = 0.08
  c.probe.rehearse = 28  # Rows an update: 64 with 2 + 1 of each experience.
  c.probe.weight = 30.0  # Of their KL.
  c.keep = 2
  c.wandb = common.wandb()
  tooled = bool(set(kinds) & set(common.PUZZLES))
  if tooled:  # Most calls take a second: fewer questions, so that it takes minutes as well.
    c.stream.n, c.shifted.n, c.original.n = 128, 100, 100
    c.probe.tasks.n, c.probe.canary = 128, 48
  if arg == "debug":
    c.stream.n, c.shifted.n, c.original.n = 8, 4, 4
    c.arrivals, c.samples, c.learn.requests, c.learn.publish_every = 4, 2, 2, 1
    c.learn.replay.experiences = 1
    c.learn.look.updates, c.learn.look.pairs, c.learn.look.held = 1, 2, 2
    c.learn.look.copies = 1
    c.probe.tasks.n, c.probe.canary, c.probe.rehearse = 6, 2, 2
    c.learn.rows_multiple = 8
    c.calibration.tasks.n = 8
  asked = (c.stream, c.shifted, c.original, c.probe.tasks, c.calibration.tasks)
  if tooled:
    common.all_tools(c)
    # Films have up to 480 patches, other pictures 64.
    c.learn.max_tokens, c.learn.max_patches = c.limits.tokens, 512
  for questions in asked if kinds else ():
    questions.kinds = kinds
  if arg in OWN:
    common.own(c, tools=arg != "text")
    c.learn.max_tokens, c.learn.max_patches, c.learn.rows_multiple = 16_384, 16_384, 1
    c.learn.lr, c.learn.lr_min, c.learn.patch_scale = 1e-6, 1e-8, 1.0
    c.learn.accumulate = 8
    c.learn.look.pairs, c.learn.look.held, c.learn.look.capacity = 4, 4, 32
    c.learn.look.copies = 2
    c.learn.look.updates, c.learn.look.lr, c.learn.look.muon_scale = 2, 1e-6, 0.0
  if arg == "text":
    c.model.freeze, c.baseline = (), False  # It would be the same.
    c.vote.voters, c.vote.rule = ("samples", "memory"), "majority"
    c.gate.clearer = False  # There is nothing to look at.
    # The entropy of a turn is that of its reasoning: it does not say how sure the answer is. And a
    # voted answer behind the reasoning of another teaches to contradict oneself.
    c.vote.trust_half, c.learn.corrections = 0.0, 0
  if arg in RELEASED:
    common.released(c, arg)
    # Answers and updates take turns. Where answers are given heads and matrices are split, as
    # weights that lie each on one device would be gathered at each token; what learns lies so.
    c.pace, c.mesh.data, c.mesh.tensor = "lockstep", -1, common.SIZES[arg]
    c.learn.mesh.fsdp, c.learn.accumulate, c.model.max_rows = -1, 4, 64
  c.lock()
  return c
