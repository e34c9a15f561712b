"""The console script: what it writes, the numbers of `score`, one clear line for each mistake."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixelis_jax import cli, runs, sampler
from pixelis_jax.metrics import Metrics, TrajectoryLog, read_lines
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.load import INDEX, WEIGHTS, load, save
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.peft import WEIGHTS as ADAPTER
from pixelis_jax.model.peft import save_adapter
from pixelis_jax.model.policy import Model
from pixelis_jax.serve import doctor
from pixelis_jax.types import Segment, Status, Step, Trajectory
from tests import fakes

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets" / "tiny-vl"

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  """The embedded model's directory with random weights, large enough that every token matters."""
  path = tmp_path_factory.mktemp("models") / "random"
  made = Model(ModelConfig.from_hf(json.loads((ASSETS / "config.json").read_text())))
  leaves, tree = jax.tree.flatten(made.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  # Matrices of about 128^-0.5: activations keep their size. Norms and biases move too.
  noisy = [np.asarray(x) + rng.normal(0, 0.08, x.shape).astype(np.float32) for x in leaves]
  save(path, made, jax.tree.unflatten(tree, noisy), source=ASSETS)
  return path


@pytest.fixture
def broken(model, tmp_path) -> Path:
  """A copy that a test may damage."""
  return Path(shutil.copytree(model, tmp_path / "broken"))


def picture(path: Path, height: int = 96, width: int = 128, seed: int = 0) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(fakes.image(height, width, seed=seed)).save(path)
  return path


def text(content: str) -> dict:
  return {"type": "text", "text": content}


def shown(path: str) -> dict:
  return {"type": "image", "image": path}


def write(path: Path, content: object) -> Path:
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def refused(capsys, *argv) -> str:
  """The one line that a mistake prints; nothing else is printed, and the exit code is 2."""
  assert cli.main([str(a) for a in argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith(f"pixelis {argv[0]}: ")
  return err


# score


CONVERSATION = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": [shown("a.png"), text("Which digit is in the red frame?\n")]},
  {"role": "assistant", "content": '<tool_call>\n{"name": "zoom_in"}\n</tool_call>'},
  {"role": "user", "content": [text("Here is the zoomed image."), shown("pictures/b.png")]},
  {"role": "assistant", "content": [text("\\boxed{7}"), text(" e\u0301 数")]},
]


def by_transformers(model: Path, messages: list, images: list[Path]) -> tuple[list, np.ndarray]:
  """Token ids and log-probabilities by transformers and torch alone."""
  processor = Qwen2VLImageProcessorPil.from_pretrained(model)
  tokenizer = AutoTokenizer.from_pretrained(str(model))
  pixels = processor([Image.open(path).convert("RGB") for path in images], return_tensors="pt")
  grids = pixels["image_grid_thw"]
  rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
  first, *rest = rendered.split("<|image_pad|>")
  for grid, piece in zip(grids, rest, strict=True):
    first += "<|image_pad|>" * (int(grid.prod()) // 4) + piece
  tokens = torch.tensor([tokenizer.encode(first, add_special_tokens=False)])
  net = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
  kinds = (tokens == net.config.image_token_id).int()
  positions, _ = net.model.get_rope_index(
    tokens, kinds, image_grid_thw=grids, attention_mask=torch.ones_like(tokens)
  )
  with torch.no_grad():
    logits = net(
      input_ids=tokens,
      attention_mask=torch.ones_like(tokens),
      position_ids=positions,
      pixel_values=pixels["pixel_values"],
      image_grid_thw=grids,
    ).logits
  logps = torch.log_softmax(logits[0, :-1], -1).gather(1, tokens[0, 1:, None])[:, 0]
  return tokens[0].tolist(), logps.numpy()


@pytest.mark.parametrize("weights", ["random", "embedded"])
def test_score_equals_transformers(weights, model, tmp_path, capsys):
  model = {"random": model, "embedded": ASSETS}[weights]
  images = [picture(tmp_path / "a.png", 448, 448), picture(tmp_path / "pictures" / "b.png", 60, 90)]
  file = write(tmp_path / "messages.json", CONVERSATION)
  out = tmp_path / "made" / "out.json"
  assert cli.main(["score", "--model", str(model), "--messages", str(file), "--out", str(out)]) == 0
  got = json.loads(out.read_text())
  tokens, logps = by_transformers(model, CONVERSATION, images)
  assert got.keys() == {"tokens", "logps"}
  assert got["tokens"] == tokens
  assert len(got["logps"]) == len(tokens) - 1
  # Two float32 programs; one token or image out of place moves these by more than 1.
  np.testing.assert_allclose(got["logps"], logps, atol=1e-4)
  assert logps.std() > 0.5
  assert not list(out.parent.glob("*.partial"))
  assert str(out) in capsys.readouterr().out


def test_score_without_images(model, tmp_path):
  file = write(tmp_path / "m.json", [{"role": "user", "content": "red"}])
  out = tmp_path / "out.json"
  assert cli.main(["score", "--model", str(model), "--messages", str(file), "--out", str(out)]) == 0
  tokens = json.loads(out.read_text())["tokens"]
  tokenizer = AutoTokenizer.from_pretrained(str(model))
  assert tokenizer.decode(tokens) == "<|im_start|>user\nred<|im_end|>\n"


@pytest.mark.parametrize(
  "messages, said",
  [
    ("[", "m.json is not JSON"),
    ({"messages": []}, "m.json: messages must be a list of at least one message"),
    ([], "must be a list of at least one message"),
    (["hi"], "message 1 must be an object with the keys"),
    ([{"role": "user", "contents": "hi"}], r"message 1 has unknown keys \['contents'\]"),
    ([{"role": "user"}], r"message 1 lacks \['content'\]"),
    ([{"role": "bot", "content": "hi"}], "message 1: role 'bot' must be one of"),
    ([{"role": "user", "content": 3}], "message 1: content must be a text or a list"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "message 1, part 1 must be an object"),
    ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "image must be a string"),
    ([{"role": "user", "content": [text("a") | {"x": 1}]}], r"part 1 has unknown keys \['x'\]"),
    ([{"role": "user", "content": [shown("no.png")]}], "there is no image .*no.png"),
    ([{"role": "user", "content": [shown("m.json")]}], "image .*m.json cannot be read"),
  ],
)
def test_score_says_what_is_wrong_with_the_messages(model, tmp_path, capsys, messages, said):
  file = write(tmp_path / "m.json", messages)
  argv = ("score", "--model", model, "--messages", file, "--out", tmp_path / "out.json")
  with pytest.raises(ValueError, match=said):
    raise ValueError(refused(capsys, *argv))
  assert not (tmp_path / "out.json").exists()


def damage_weights(path: Path) -> None:
  (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:1000])


def damage_config(path: Path) -> None:
  config = json.loads((path / "config.json").read_text())
  write(path / "config.json", config | {"model_type": "qwen9"})


@pytest.mark.parametrize(
  "damage, said",
  [
    (shutil.rmtree, "there is no directory .*broken"),
    (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    (damage_weights, f"{WEIGHTS} is truncated or not a safetensors file"),
    (lambda path: (path / "config.json").unlink(), "config.json is missing"),
    (damage_config, "qwen9"),
    (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda path: write(path / "tokenizer.json", "{"), "tokenizer.json is not JSON"),
    (lambda path: write(path / "tokenizer.json", "{}"), 'tokenizer.json must be .* "model"'),
    (lambda path: write(path / "preprocessor_config.json", "{"), "config.json is not JSON"),
    (lambda path: (path / "preprocessor_config.json").unlink(), "has no preprocessor_config"),
    (lambda path: (path / "chat_template.jinja").unlink(), "has no chat template"),
  ],
)
@pytest.mark.parametrize("command", ["ask", "score"])
def test_a_damaged_model_is_named(broken, tmp_path, capsys, command, damage, said):
  damage(broken)
  if command == "ask":
    argv = ("--image", picture(tmp_path / "a.png"), "what?")
  else:
    file = write(tmp_path / "m.json", [{"role": "user", "content": "hi"}])
    argv = ("--messages", file, "--out", tmp_path / "out.json")
  with pytest.raises(ValueError, match=said):
    raise ValueError(refused(capsys, command, "--model", broken, *argv))


# ask


def test_ask_plays_the_directory(model, tmp_path, capsys):
  image = picture(tmp_path / "a.png", 400, 400)
  argv = ["ask", "--model", str(model), "--image", str(image), "--max-tokens", "4", "--json", "hm?"]
  assert cli.main(argv) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["images"] == [{"path": str(image), "size": [400, 400], "shown": [80, 80]}]
  assert told["question"] == "hm?" and told["turns"][0]["text"]
  # Four random tokens hold no call and no answer.
  assert told["answer"] is None and told["status"] in ("out_of_tokens", "no_answer")
  argv.remove("--json")
  assert cli.main(argv) == 0
  assert "turn 1\n" in capsys.readouterr().out  # Greedy: the same episode, to read.


ZOOM = '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [20, 40, 40, 80]}}\n</tool_call>'
FAR = '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [500, 0, 600, 9]}}\n</tool_call>'


@pytest.fixture
def says(monkeypatch):
  """Puts words into the policy's mouth, turn by turn; its directory and tools stay real."""

  def script(*texts: str) -> None:
    def bind(self, params, *, key, version, temperature):
      context = Segment(tokens=np.zeros(0, np.int32))
      return lambda requests: [
        fakes.completion(texts[len(turns)], context=context) for _, turns in requests
      ]

    monkeypatch.setattr(sampler.Sampler, "bind", bind)

  return script


def test_ask_shows_each_turn_and_keeps_the_crops(model, tmp_path, capsys, says):
  says(ZOOM, FAR, "It is \\boxed{7}.")
  image = picture(tmp_path / "a.png", 400, 400)
  out = tmp_path / "out"
  argv = ["ask", "--model", str(model), "--image", str(image), "--out", str(out), "which digit?"]
  assert cli.main(argv) == 0
  printed = capsys.readouterr().out
  # Shown at 80: five source pixels each. x0 = 5 * 20.
  parts = (
    "400 x 400 shown at 80 x 80",
    '-> zoom_in {"bbox_2d": [20, 40, 40, 80]}',
    "<- pixels [100, 200, 200, 400] of image 1",
    "<- Here is the zoomed image.",
    "turn 2",
    "<- error: bbox_2d",
    "turn 3",
    "It is \\boxed{7}.",
    "answer: 7 (answered)",
  )
  at = [printed.index(part) for part in parts]
  assert at == sorted(at)

  (line,) = read_lines(out / "trajectories.jsonl")
  assert line["tag"] == "ask" and line["answer"] == "7" and line["truth"] is None
  crop = np.array(Image.open(out / line["turns"][0]["images"][0]["path"]))
  np.testing.assert_array_equal(crop, fakes.image(400, 400)[200:400, 100:200])

  assert cli.main([*argv, "--json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["turns"][0]["pictures"] == [{"image": 1, "box": [100, 200, 200, 400]}]
  assert told["turns"][1]["error"] and told["turns"][2]["call"] is None
  assert (told["answer"], told["status"]) == ("7", "answered")
  assert len(read_lines(out / "trajectories.jsonl")) == 2  # Added, not replaced.


def test_ask_without_tools_refuses_calls(model, tmp_path, capsys, says):
  says(ZOOM, "\\boxed{7}")
  image = picture(tmp_path / "a.png")
  argv = ["ask", "--model", str(model), "--image", str(image), "--tools", "none", "--json", "what?"]
  assert cli.main(argv) == 0
  turn = json.loads(capsys.readouterr().out)["turns"][0]
  assert "unknown tool 'zoom_in'" in turn["error"] and not turn["pictures"]


def test_a_phone_picture_is_shown_upright(model, tmp_path, capsys, says):
  says("\\boxed{7}")
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: turned by a quarter.
  Image.fromarray(fakes.image(40, 80)).save(tmp_path / "a.png", exif=exif)
  cli.main(["ask", "--model", str(model), "--image", str(tmp_path / "a.png"), "--json", "what?"])
  assert json.loads(capsys.readouterr().out)["images"][0]["size"] == [80, 40]


@pytest.mark.parametrize(
  "options, said",
  [
    (("--image", "nowhere.png"), "there is no image nowhere.png"),
    (("--tools", "zoom"), r"tools \['zoom'\] must be among .*'zoom_in'\]"),
    (("--adapter", "{folder}/no"), "adapter_config.json is missing"),
    (("--preset", "qwen9"), "preset 'qwen9' must be one of"),
    (("--temperature", "-1"), "--temperature -1.0 must be 0 or more"),
    (("--max-tokens", "0"), "--max-tokens 0 must be 1 or more"),
    (("--image", "{folder}/text.png"), "image .*text.png cannot be read"),
    (("--image", "{folder}/cut.png"), "image .*cut.png cannot be read"),
    (("--image", "{folder}/thin.png"), "thin.png: image of 1 x 300 pixels"),
    (("--out", "{folder}/a.png"), "a.png"),
  ],
)
def test_ask_says_what_is_wrong(model, tmp_path, capsys, says, options, said):
  says("\\boxed{7}")
  image = picture(tmp_path / "a.png")
  picture(tmp_path / "thin.png", 1, 300)
  (tmp_path / "text.png").write_text("no picture")
  (tmp_path / "cut.png").write_bytes(image.read_bytes()[:2000])
  options = [option.format(folder=tmp_path) for option in options]
  with pytest.raises(ValueError, match=said):
    raise ValueError(refused(capsys, "ask", "--model", model, "--image", image, *options, "what?"))


def test_ask_without_images(model, capsys, says):
  says("\\boxed{7}")
  assert cli.main(["ask", "--model", str(model), "--tools", "none", "--json", "3 + 4?"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["images"] == [] and told["answer"] == "7"


def test_a_text_only_model_is_not_asked_about_images(broken, tmp_path, capsys):
  write(broken / "config.json", {"model_type": "qwen3"})
  argv = ("ask", "--model", broken, "--image", picture(tmp_path / "a.png"), "what?")
  assert "holds a text-only model: it cannot be shown --image" in refused(capsys, *argv)


def test_an_empty_question_is_refused(model, tmp_path, capsys):
  argv = ("ask", "--model", model, "--image", picture(tmp_path / "a.png"), " ")
  assert "the question is empty" in refused(capsys, *argv)


# doctor


def test_doctor_tells_what_runs(capsys):
  assert cli.main(["doctor"]) == 0
  out = capsys.readouterr().out
  facts = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
  assert facts["jax"].strip() == jax.__version__
  assert facts["devices"].strip() == "8 x cpu (cpu)"  # tests/conftest.py asks for eight.
  assert facts["attention backend"].strip() == "xla for bfloat16, xla for float32"
  assert facts["kernels"].strip().startswith("ours, ")
  for name in ("python", "flax", "optax", "orbax-checkpoint", "transformers", "memory"):
    assert name in facts


def test_doctor_lists_problems_and_still_ends_well(capsys, monkeypatch):
  monkeypatch.setattr(doctor, "examine", lambda: ({"jax": "0.1"}, ["jax is old: update it"]))
  assert cli.main(["doctor"]) == 0
  assert capsys.readouterr().out == "jax  0.1\n\n1 problem\n- jax is old: update it\n"


# view, export, requests


def test_view_writes_the_report_and_prints_where(tmp_path, capsys):
  counts = {"n": 4, "shifted_before": 0.5, "shifted_after": 0.75}
  write(tmp_path / "result.json", counts | {"original_before": 1.0, "original_after": 1.0})
  with Metrics(tmp_path) as metrics:
    metrics.log(1, {"majority_ratio": 0.5})
  steps = (Step(completion=fakes.completion("\\boxed{7}")),)
  played = Trajectory(task=fakes.task("a"), steps=steps, status=Status.ANSWERED, answer="7")
  with TrajectoryLog(tmp_path) as log:
    log.write(1, "stream", played)
  assert cli.main(["view", str(tmp_path)]) == 0
  page = Path(capsys.readouterr().out.strip())
  assert page == tmp_path / "report.html" and "Run report" in page.read_text()
  (tmp_path / "result.json").unlink()
  assert "result.json is missing" in refused(capsys, "view", tmp_path)
  assert "there is no directory" in refused(capsys, "view", tmp_path / "no")


@pytest.fixture
def workdir(model, tmp_path) -> Path:
  """Of a run that ended: its model is in model/."""
  shutil.copytree(model, tmp_path / "run" / "model")
  return tmp_path / "run"


def test_export_completes_a_directory_that_transformers_loads(workdir, tmp_path, capsys):
  out = tmp_path / "tiny-vl"
  out.mkdir()
  for file in ASSETS.iterdir():  # As in a clone: everything but weights, and a file of its own.
    if file.suffix != ".safetensors":
      shutil.copy(file, out)
  (out / "README.md").write_text("kept")
  assert cli.main(["export", str(workdir), str(out)]) == 0
  assert str(out) in capsys.readouterr().out
  assert (out / "README.md").read_text() == "kept"
  assert not list(out.glob("*.partial"))
  net, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
  assert not any(loading.values())
  ours = load(workdir / "model")[1]["text"]["embedding"]
  np.testing.assert_array_equal(net.get_input_embeddings().weight.detach().numpy(), ours)


def test_export_of_a_checkpoint(workdir, tmp_path, capsys, monkeypatch):
  """By its step, or the latest of a run that has not ended; nothing of it stays beside OUT."""
  asked = []

  def save_checkpoint(run, out, *, step, best):
    asked.append((run, step, best))
    shutil.copytree(ASSETS, out / "model")
    return step or 40

  monkeypatch.setattr(runs, "save_checkpoint", save_checkpoint)
  assert cli.main(["export", str(workdir), str(tmp_path / "ended")]) == 0 and not asked
  for name, chosen in (("early", ["--step", "20"]), ("best", ["--best"]), ("late", [])):
    if not chosen:
      shutil.rmtree(workdir / "model")
    assert cli.main(["export", str(workdir), str(tmp_path / "out" / name), *chosen]) == 0
    load(tmp_path / "out" / name)
  assert asked == [(workdir, 20, False), (workdir, None, True), (workdir, None, False)]
  assert "the checkpoint of step 40" in capsys.readouterr().out
  assert {f.name for f in (tmp_path / "out").iterdir()} == {"early", "best", "late"}


def test_export_replaces_weights_only_when_forced(workdir, tmp_path, capsys):
  out = tmp_path / "tiny-vl"
  out.mkdir()
  (out / WEIGHTS).write_bytes(b"old")
  # An index is read before model.safetensors: left there, the old weights would win.
  write(out / INDEX, {"weight_map": {}})
  (out / "model-00001-of-00001.safetensors").write_bytes(b"old")
  assert "--force" in refused(capsys, "export", workdir, out)
  assert (out / WEIGHTS).read_bytes() == b"old" and (out / INDEX).exists()
  assert cli.main(["export", str(workdir), str(out), "--force"]) == 0
  assert {f.name for f in out.iterdir()} == {f.name for f in (workdir / "model").iterdir()}
  load(out)


@pytest.fixture
def adapted(workdir) -> Path:
  """Of a run that trained adapters: also in adapter/."""
  model, params = load(workdir / "model")
  model = dataclasses.replace(model, lora=LoraConfig(rank=2, alpha=4.0))
  params = model.adapt(params, jax.random.key(0))
  q = params["text"]["layers"]["attn"]["q"]
  q["lora_b"] = jax.random.normal(jax.random.key(1), q["lora_b"].shape)
  save_adapter(workdir / "adapter", model, params, "org/base")
  return workdir


@pytest.fixture
def seen(monkeypatch):
  """The parameters that each `ask` plays with; the policy answers 7."""
  found = []

  def bind(self, params, *, key, version, temperature):
    found.append(params)
    context = Segment(tokens=np.zeros(0, np.int32))
    return lambda requests: [fakes.completion("\\boxed{7}", context=context) for _ in requests]

  monkeypatch.setattr(sampler.Sampler, "bind", bind)
  return found


def test_ask_with_int8_keeps_the_kernels_small(adapted, capsys, seen):
  asked = ["ask", "--model", str(adapted / "model"), "3 + 4?", "--int8"]
  assert cli.main(asked) == 0
  kernel = seen[0]["text"]["layers"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == np.int8 and seen[0]["text"]["embedding"].dtype == np.float32
  assert cli.main([*asked, "--adapter", str(adapted / "adapter")]) == 2
  assert "model.int8 only answers" in capsys.readouterr().err


def test_ask_with_an_adapter_uses_the_merged_weights(adapted, capsys, seen):
  asked = ["ask", "--model", str(adapted / "model"), "3 + 4?", "--tools", "none"]
  assert cli.main(asked) == cli.main([*asked, "--adapter", str(adapted / "adapter")]) == 0
  plain, merged = seen
  assert jax.tree.structure(plain) == jax.tree.structure(merged)
  layers = (params["text"]["layers"]["attn"] for params in (plain, merged))
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), *layers)
  assert moved["q"]["kernel"] > 0.1 and moved["k"]["kernel"] == 0.0


def test_export_copies_an_adapter_that_peft_loads(adapted, tmp_path, capsys):
  out = tmp_path / "out"
  assert cli.main(["export", str(adapted), str(out), "--adapter"]) == 0
  assert str(out) in capsys.readouterr().out
  assert {f.name for f in out.iterdir()} == {"adapter_config.json", ADAPTER}
  net = Qwen2_5_VLForConditionalGeneration.from_pretrained(adapted / "model")
  with warnings.catch_warnings():  # peft 0.21 reads a field that transformers 5.24 deprecates.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    net = peft.PeftModel.from_pretrained(net, out)
  assert net.peft_config["default"].base_model_name_or_path == "org/base"
  # An adapter that is there stays unless told otherwise.
  (out / ADAPTER).write_bytes(b"old")
  assert "--force" in refused(capsys, "export", adapted, out, "--adapter")
  assert (out / ADAPTER).read_bytes() == b"old"
  assert cli.main(["export", str(adapted), str(out), "--adapter", "--force"]) == 0
  assert (out / ADAPTER).read_bytes() == (adapted / "adapter" / ADAPTER).read_bytes()


def test_export_of_an_adapter_refuses_what_would_harm(workdir, tmp_path, capsys, request):
  out = tmp_path / "out"
  assert "trained no adapter" in refused(capsys, "export", workdir, out, "--adapter")
  adapted = request.getfixturevalue("adapted")
  own = adapted / "adapter"
  assert "the run's own adapter" in refused(capsys, "export", adapted, own, "--adapter")
  # Beside a model transformers would lay it over weights that may have it already.
  model = shutil.copytree(adapted / "model", tmp_path / "model")
  assert "holds a model" in refused(capsys, "export", adapted, model, "--adapter", "--force")
  (own / ADAPTER).write_bytes((own / ADAPTER).read_bytes()[:1000])
  assert "truncated" in refused(capsys, "export", adapted, out, "--adapter")
  assert not out.exists()


def test_export_replaces_nothing_with_a_damaged_model(workdir, tmp_path, capsys):
  out = tmp_path / "out"
  assert "there is no directory" in refused(capsys, "export", tmp_path / "no", out)
  assert "the run's own model" in refused(capsys, "export", workdir, workdir / "model")
  damage_weights(workdir / "model")
  assert "truncated" in refused(capsys, "export", workdir, out, "--force")
  assert not out.exists()


def test_requests_counts_and_names_the_lines(model, tmp_path, capsys):
  picture(tmp_path / "a.png")
  good = {"request_id": "1", "question": "what?", "image": "a.png"}
  ids = {"request_id": "2", "input_ids": [50, 51], "image": "a.png"}
  lines = [json.dumps(good), "{", json.dumps(good), json.dumps(good | {"request_id": 3}), ""]
  file = write(tmp_path / "r.jsonl", "\n".join([*lines, json.dumps(ids)]))
  assert cli.main(["requests", str(file)]) == 1
  out = capsys.readouterr().out
  assert "line 2: not JSON" in out and "line 3: request_id '1' was given on line 1" in out
  assert "line 6: input_ids" in out  # Without a model nothing can read them.
  assert out.endswith("2 good, 2 malformed, 1 with a request_id that was given before\n")
  assert cli.main(["requests", str(file), "--model", str(model)]) == 1
  assert "3 good, 1 malformed" in capsys.readouterr().out
  assert cli.main(["requests", str(write(tmp_path / "g.jsonl", json.dumps(good)))]) == 0
  assert "1 good, 0 malformed" in capsys.readouterr().out
  assert "no.jsonl is not a file" in refused(capsys, "requests", tmp_path / "no.jsonl")


# the script itself


@pytest.mark.parametrize("argv", [["--help"], ["ask", "--help"], ["nonsense"], ["view"]])
def test_help_and_usage_load_no_engine(argv):
  """Only the standard library, numpy and jaxtyping: JAX and transformers take seconds."""
  code = (
    "import sys; from pixelis_jax import cli\n"
    "try: cli.main(sys.argv[1:])\n"
    "except SystemExit as e: code = e.code\n"
    "heavy = {'jax', 'flax', 'transformers', 'PIL', 'jinja2', 'tensorboardX'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "sys.exit(code)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == (0 if "--help" in argv else 2), done.stderr
  assert "usage: pixelis" in done.stdout + done.stderr


def test_our_own_mistakes_are_not_hidden(monkeypatch):
  def wrong(args):
    raise TypeError("ours")

  monkeypatch.setattr(cli, "view", wrong)
  with pytest.raises(TypeError, match="ours"):
    cli.main(["view", "x"])
