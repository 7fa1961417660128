"""Hugging Face folders in whole runs: loaded into any layout, trained, exported, and continued by transformers."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from helpers.hf_models import (
    LLAMA,
    LLAMA3_ROPE,
    build,
    checkpoint_of,
    load_ours,
    quantize,
    random_weights,
    save,
    tensors_of,
)
from helpers.ranks import run_ranks
from helpers.runs import TINY, argv, options, read_metrics, run_command, whole, write_ragged_text

import train
from config import load_config
from errors import ConfigError
from hf import get_model_args, load_hf
from hf import safetensors as hf_files
from hf.export import export_hf
from model import ModelArgs, Transformer, get_flavor
from parallelize.init import held_indices
from resilience.process_group import init_distributed

# Without options of [model], because the folder decides the model.
RUN = {name: value for name, value in TINY.items() if not name.startswith("model.")}
# FSDP cuts the 24 rows of the keys inside of a head, which has 12. It cannot cut 62 or 258 rows into 4 equal parts.
SHAPE = dict(hidden_size=48, intermediate_size=62, vocab_size=258, num_hidden_layers=4, rope_parameters=LLAMA3_ROPE)
LAYOUTS = {  # of 4 ranks; degrees by the beginning of the option's name
    "fsdp 4": {},
    "fsdp 2 x tp 2": {"tensor_parallel": 2},
    "pp 2 x fsdp 2": {"pipeline_parallel": 2},
    "pp 2 x tp 2": {"pipeline_parallel": 2, "tensor_parallel": 2},
    "pp 2 (two stages a rank) x cp 2": {"pipeline_parallel": 2, "context_parallel": 2},
    "fsdp 2 x tp 2, ep 4": {"tensor_parallel": 2, "expert_parallel": 4},
    "pp 2 x fsdp 2, ep 2": {"pipeline_parallel": 2, "expert_parallel": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    paths = {}
    for name, tied in (("untied", False), ("tied", True)):
        model = build("Llama", **dict(LLAMA, **SHAPE, tie_word_embeddings=tied))
        paths[name] = save(model, root / name, max_shard_size="50KB")
    # transformers does not save MTP layers, so this folder is our export. test_hf.py compares one with transformers.
    # The blocks of the float8 copy do not end where the shards of the ranks end.
    args = dataclasses.replace(get_flavor("deepseek_v3_debug"), dim=48, n_layers=3, vocab_size=258, n_experts=12)
    checkpoint = checkpoint_of(random_weights(Transformer(args).double()), root)
    export_hf(checkpoint, str(root / "V3"), max_bytes=100_000)
    paths["V3"] = root / "V3"
    paths["V3 in float8"] = root / "float8"
    quantize(paths["V3"], paths["V3 in float8"], root / "twin", (20, 20))
    return {name: str(path) for name, path in paths.items()}


def in_layout(name: str) -> dict[str, str]:
    degrees = {f"parallelism.{key}_degree": str(value) for key, value in LAYOUTS[name].items()}
    return degrees | ({"parallelism.pipeline_parallel_schedule": "Interleaved1F1B"} if "two stages" in name else {})


def from_folder(folder: str) -> dict[str, str]:
    return options(
        model__flavor=f"hf:{folder}", checkpoint__initial_load_path=folder, checkpoint__initial_load_in_hf="true"
    )


# ------------------------------------------------------------------------------------------------ loading


def load_in_layouts(cases: list[list[str]]) -> list[tuple[dict, int]]:
    """For each of the cases (command lines): the tensors that this rank holds after loading, by name, and the number of
    elements that it has read from files."""
    counted = []

    class CountingSlice:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __getitem__(self, box):
            values = self.inner[box]
            counted.append(values.numel())
            return values

    open_slice = hf_files.TensorReader._slice
    hf_files.TensorReader._slice = lambda self, name: CountingSlice(open_slice(self, name))
    init_distributed("cpu", 60)
    results = []
    for arguments in cases:
        config = load_config(arguments)
        mesh = train.build_mesh("cpu", dist.get_world_size(), **config.parallelism.degrees)
        args = get_model_args(**vars(config.model), initial_hf_folder=config.checkpoint.initial_load_path)
        stages = train.build_stages(config, args, mesh, 8, log=lambda _: None)
        counted.clear()
        for stage in stages:
            stage.to_empty(device="cpu")
            stage.tie_weights()
        tensors = train.ExpertLoadBalancer(stages, mesh.tokens, mesh.pp).biases
        tied = train.TiedEmbedding(stages, mesh.pp, schedule=config.parallelism.pipeline_parallel_schedule)
        tensors |= tied.unique_parameters(stages)
        load_hf(config.checkpoint.initial_load_path, tensors, args)
        held = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            held[name] = (tensor.shape, held_indices(tensor), local.detach().clone())
        results.append((held, sum(counted)))
    return results


def test_load_in_each_layout_equals_one_process(folders):
    """The weights are equal to the last bit. A rank reads only what it holds, and the rest of a head that is cut."""
    cases = [
        *(("untied", name) for name in list(LAYOUTS)[:5]),
        ("tied", "pp 2 x fsdp 2"),
        *(("V3", name) for name in ("fsdp 4", "pp 2 x fsdp 2, ep 2")),
        ("V3 in float8", "fsdp 2 x tp 2, ep 4"),
    ]
    lines = [argv(RUN, from_folder(folders[folder]), in_layout(name)) for folder, name in cases]
    by_rank = run_ranks(4, load_in_layouts, lines)
    expected = {name: tensors_of(load_ours(Path(folder))) for name, folder in folders.items()}
    for (folder, name), *ranks in zip(cases, *by_rank, strict=True):
        found = whole([held for held, _ in ranks])
        assert found.keys() == expected[folder].keys()
        for tensor_name, tensor in expected[folder].items():
            assert torch.equal(found[tensor_name], tensor), (folder, name, tensor_name)
        for rank, (held, read) in enumerate(ranks):
            num_held = sum(values.numel() for _, _, values in held.values())
            assert num_held <= read < 1.15 * num_held, (folder, name, rank)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return options(data__path=write_ragged_text(folder), data__cache_folder=folder / "cache")


def run(ranks: int, folder: Path, *settings) -> list[str]:
    folder.mkdir(exist_ok=True)
    ended_well, lines = run_command(ranks, argv(RUN, {"job.dump_folder": str(folder / "run")}, *settings), folder)
    assert ended_well, lines
    return lines


def generate_with_ours(checkpoint: Path, tokens: list[int], count: int) -> list[int]:
    """tokens, continued by the `count` most likely tokens (greedy decoding)."""
    model = Transformer(ModelArgs(**json.loads((checkpoint / "state.json").read_text())["model_args"])).double().eval()
    dcp.load({f"model.{k}": t.detach() for k, t in tensors_of(model).items()}, checkpoint_id=checkpoint, no_dist=True)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return tokens


@pytest.mark.parametrize("kind, layout", [("tied", "pp 2 x tp 2"), ("V3", "fsdp 2 x tp 2, ep 4")])
def test_run_from_folder_resumes_and_exports_in_any_layout(kind, layout, folders, text, tmp_path):
    """A run that starts from a Hugging Face folder has the same metrics on one process and on four. Started again, it
    resumes from its checkpoint, not from the folder. transformers opens the export and generates our tokens."""
    start = from_folder(folders[kind]) | options(optimizer__lr="0.003", training__local_batch_size="2")
    save = options(checkpoint__enable="true", checkpoint__interval="2")
    run(1, tmp_path / "one", text, start)
    run(4, tmp_path / "four", text, start, save, in_layout(layout))
    for one, four in zip(*(read_metrics(tmp_path / name / "run") for name in ("one", "four")), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)
    lines = run(1, tmp_path / "four", text, start, save, options(training__steps="4"))
    assert any("resumed at step 3 " in line for line in lines), lines

    checkpoint, exported = tmp_path / "four" / "run" / "checkpoint" / "step-3", tmp_path / "exported"
    command = [sys.executable, "scripts/export_hf.py", str(checkpoint), str(exported), "--like", folders[kind]]
    subprocess.run(command, check=True, capture_output=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float64, experts_implementation="eager"
    )
    prompt = list(b"abc def")
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    assert theirs == generate_with_ours(checkpoint, prompt, 24)
    assert len(theirs) == len(prompt) + 24 and len(set(theirs)) > 4, theirs

    refused = subprocess.run([*command[:2], str(exported), str(tmp_path / "more")], capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "no manifest.json" in refused.stderr


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"checkpoint.initial_load_path": "untied", "checkpoint.initial_load_in_hf": "true"}, "--model.flavor hf:"),
        (from_folder("untied") | {"model.n_mtp_layers": "1"}, "LlamaForCausalLM has no tensor for mtp.0."),
    ],
)
def test_folder_of_another_model_ends_run_with_one_line(settings, message, folders, text, tmp_path):
    """It is the last line of a run of two ranks, and only rank 0 prints it."""
    settings = {name: value.replace("untied", folders["untied"]) for name, value in settings.items()}
    ended_well, lines = run_command(2, argv(RUN, text, {"job.dump_folder": str(tmp_path / "run")}, settings), tmp_path)
    assert not ended_well and message in lines[-1] and "Traceback" not in "\n".join(lines), lines
    assert [line for line in lines if line.startswith("error")] == lines[-1:]


def test_missing_folder_is_rejected():
    """The folder of a flavor, and the folder of the weights."""
    for arguments in (("hf:/no/such",), ("llama3_debug", "/no/such")):
        with pytest.raises(ConfigError, match=r"cannot read /no/such/config.json: No such file"):
            get_model_args(*arguments)


def test_initial_load_in_hf_needs_initial_load_path():
    """Alone it would have no effect."""
    with pytest.raises(ValueError, match=r"checkpoint.initial_load_path"):
        load_config(["--checkpoint.initial_load_in_hf=true"])
