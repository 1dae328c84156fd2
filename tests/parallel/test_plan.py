"""What a plan says against what a simulated world of 256 builds, and against what can be run and counted here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tasks.__main__ import main
from tasks.plan import read
from zoo.models import count_parameters
from zoo.parallel import Mesh, Sizes, parallelize
from zoo.parallel.overlap import Pair, exposed
from zoo.parallel.parts import local
from zoo.parallel.plan import Facts, Machine, Work, estimate, local_parameters, meshes, ranked, remote_processes
from zoo.parallel.spread import spreadable

CONFIGS = Path(__file__).parents[2] / "configs" / "language"
BUILT = {
    "deepseek_v3": [
        Sizes(1, 4, 64, 1),
        Sizes(2, 1, 128, 1),
        Sizes(1, 2, 32, 4),
        Sizes(1, 1, 256, 1),
        Sizes(1, 256, 1, 1),
    ],
    "mixtral_8x22b": [Sizes(4, 8, 8, 1), Sizes(2, 8, 4, 4), Sizes(32, 1, 8, 1), Sizes(1, 64, 1, 4)],
}


def meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return zoo.create_model(f"language/{name}", **options)


def facts(model: Any) -> Facts:
    return Facts(model, count_parameters(model)[1], count_parameters(model, learning=True)[1])


def simulate(rank: int, folder: str) -> None:
    """Parallelise without memory, as the first and as another of 256 processes that are not there."""
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.simplefilter("ignore")
    held = {}
    for seat in (0, 77):
        dist.init_process_group("fake", rank=seat, world_size=256, store=FakeStore())
        for name, every in BUILT.items():
            for sizes in every if seat == 0 else every[:1]:
                model = parallelize(meta(name), Mesh(sizes))
                held[name, vars(sizes)["expert"], str(sizes), seat] = sum(local(p).numel() for p in model.parameters())
        dist.destroy_process_group()
    torch.save(held, f"{folder}/held.pt")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, int]:
    folder = tmp_path_factory.mktemp("held")
    meta("mixtral_tiny")  # imports what the process to be started would import anew
    mp.start_processes(simulate, args=(str(folder),), nprocs=1, start_method="fork")
    return torch.load(folder / "held.pt", weights_only=False)


@pytest.mark.parametrize("name", BUILT)
def test_parameters_are_those_that_256_processes_hold(name: str, held: dict[Any, int]) -> None:
    whole = meta(name)
    known = facts(whole)
    for sizes in BUILT[name]:
        planned = local_parameters(known, sizes)
        assert planned == held[name, sizes.expert, str(sizes), 0]
        # All processes together hold every parameter, those of a tensor group some of them twice.
        assert planned * 256 >= sum(p.numel() for p in whole.parameters())
    other = held[name, BUILT[name][0].expert, str(BUILT[name][0]), 77]
    assert other <= local_parameters(known, BUILT[name][0])


def test_published_sizes() -> None:
    total, active = count_parameters(meta("mixtral_8x22b"))
    assert (total / 1e9, active / 1e9) == (pytest.approx(141, rel=0.005), pytest.approx(39, rel=0.01))


SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 256}


def small(kind: str) -> Any:
    """A tiny Mixtral, with frozen weights and few that learn where kind is "adapted"."""
    model = zoo.create_model("language/mixtral_tiny", **SMALL)
    targets = ["query", "key", "value", "output"]
    return zoo.adapt(model, "MoELoRA", targets=targets, num_experts=4) if kind == "adapted" else model


def counted(rank: int, world: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = parallelize(small(kind), Mesh(Sizes(expert=world)))
    torch.manual_seed(rank)
    ids = torch.randint(0, 256, (8, 64))
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, gathered = getattr(dist, name), []

    def told(*args: Any, **options: Any) -> Any:
        part = next(options[n] for n in ("input", "input_tensor") if n in options) if len(args) < 2 else args[1]
        gathered.append((world - 1) * part.nbytes)
        return gather(*args, **options)

    setattr(dist, name, told)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16-mixed"):
        loss = model(ids, labels=ids).loss
    loss.backward()
    setattr(dist, name, gather)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    optimizer.step()
    rows = sum(e.parallel.traffic.rows for _, e in spreadable(model))  # type: ignore[union-attr]
    kept = sum(local(p).nbytes for p in model.parameters())
    state = sum(local(v).nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    torch.save((rows, kept, state, sum(gathered)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["float32", "bf16-mixed", "adapted"])
def test_bytes_sent_and_kept_are_those_of_a_real_run(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    mp.start_processes(counted, args=(4, str(tmp_path), kind), nprocs=4, start_method="fork")
    told = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    work = Work(tokens=512, sequence=64, recompute=False, compute=2 if kind == "bf16-mixed" else 4)
    plan = estimate(facts(model), Sizes(expert=4), work, Machine())
    assert plan.sent["all-gather"] == pytest.approx(told[0][3], rel=1e-6)
    assert plan.memory["parameters"] == told[0][1]
    assert plan.memory["optimizer"] == told[0][2]
    # A fresh gate is nearly even, not quite.
    assert sum(rank[0] for rank in told) == pytest.approx(4 * plan.sent["all-to-all"], rel=0.1)


@pytest.mark.parametrize("name", ["mixtral_tiny", "qwen2_moe_tiny", "deepseek_v3_tiny"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    model = zoo.create_model(f"language/{name}", **SMALL, attn_implementation="eager")
    ids = torch.randint(0, 256, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    plan = estimate(facts(model), Sizes(), Work(256, 128, recompute=False, compute=4), Machine())
    # Eager attention computes what a causal mask hides, too: as much again as the plan counts.
    attention = 3 * 2 * 128 * facts(model).attention * 3 * 256
    assert plan.flops + attention == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_head_that_is_the_embeddings_is_multiplied_by() -> None:
    sizes = {**SMALL, "vocab_size": 4096, "tie_word_embeddings": True}
    model = zoo.create_model("language/mixtral_tiny", **sizes, attn_implementation="eager")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.randint(0, 256, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    plan = estimate(facts(model), Sizes(), Work(256, 128, recompute=False, compute=4), Machine())
    attention = 3 * 2 * 128 * facts(model).attention * 3 * 256
    assert plan.flops + attention == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_classes_are_foretold_once_an_image_and_positions_are_no_products(frozen: bool) -> None:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 3000}
    sizes |= {"representation_size": 0, "moe_layers": [1], "capacity": 4.0}
    model = zoo.create_model("vision/vmoe_small_patch32_224", **sizes)
    model.head.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64)).sum().backward()
    plan = estimate(facts(model), Sizes(), Work(4 * 64, 64, recompute=False, compute=4), Machine())
    pixels = 2 * 3 * 64 * 48 * 256  # of which nobody asks for the gradient
    assert plan.flops - pixels == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("kind", ["LoRA", "MoELoRA", "in experts"])
def test_operations_with_frozen_weights_are_those_that_torch_counts(kind: str) -> None:
    """No gradients of frozen weights."""
    made = {**SMALL, "num_hidden_layers": 6}
    model = zoo.create_model("language/mixtral_tiny", **made, attn_implementation="eager")
    how = {"targets": ["gate", "up", "down"]} if kind == "in experts" else {}
    model = zoo.adapt(model, "LoRA" if kind == "in experts" else kind, rank=2, **how)
    ids = torch.randint(0, 256, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    known = facts(model)
    plan = estimate(known, Sizes(), Work(256, 128, recompute=False, compute=4), Machine())
    attention = 3 * 2 * 128 * known.attention * 6 * 256
    assert plan.flops + attention == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("router", ["SoftRouter", "ExpertChoiceRouter"])
def test_operations_of_experts_that_choose_or_have_slots_are_those_that_torch_counts(router: str) -> None:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4}
    made = {**sizes, "num_classes": 10, "representation_size": 0, "num_experts": 16, "moe_layers": [1, 2]}
    model = zoo.create_model("vision/vmoe_small_patch32_224", **made, router=router)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 64, 64)).sum().backward()
    known = facts(model)
    plan = estimate(known, Sizes(), Work(4 * 64, 64, recompute=False, compute=4), Machine())
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    # A process of four sends three quarters of what its tokens make: slots, or rows of chosen tokens.
    shared = estimate(known, Sizes(expert=4), Work(4 * 64, 64, recompute=False, compute=4), Machine())
    if router == "SoftRouter":
        rows = 4 * sum(m.router.num_experts * m.router.slots for m in model.modules() if isinstance(m, zoo.moe.MoE))
        assert shared.sent["all-to-all"] == pytest.approx(rows * 3 / 4 * 96 * 4 * 4)
    else:
        assert [stack.k for stack in known.stacks] == [2.0, 2.0]  # the paper's capacity factor


@pytest.mark.parametrize("name", ["mixtral_tiny", "qwen3_moe_tiny"])
def test_activations_are_about_what_autograd_keeps(name: str) -> None:
    model = zoo.create_model(f"language/{name}", **SMALL)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    ids = torch.randint(0, 256, (4, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    plan = estimate(facts(model), Sizes(), Work(1024, 256, recompute=False, compute=4), Machine())
    assert plan.memory["activations"] == pytest.approx(sum(kept.values()), rel=0.35)


def test_more_processes_take_less_memory_and_better_networks_less_time() -> None:
    known, work = facts(meta("mixtral_8x22b")), Work(8192, 8192)
    small, large = (estimate(known, Sizes(shard=n, expert=8), work, Machine()) for n in (2, 8))
    assert large.total_memory < small.total_memory
    slow = estimate(known, Sizes(shard=8, expert=8), work, Machine(between=1e9))
    assert slow.step > large.step
    best = ranked(known, 64, work, Machine())
    order = [(e.total_memory > Machine().memory, e.step / e.sizes.data) for e in best]
    assert order == sorted(order)
    assert {e.sizes.world for e in best} == {64}
    assert all(8 % s.expert == 0 and 8 % s.tensor == 0 for s in meshes(known, 64, 8))


def test_shared_experts_and_shortcuts_run_while_tokens_travel() -> None:
    machine, work = Machine(within=5e9), Work(8192, 4096)
    exchanges = {}
    for shortcut in (False, True):
        model = meta("mixtral_8x7b", shortcut=shortcut)
        c = model.config
        found = estimate(facts(model), Sizes(expert=8, shard=8), work, machine)
        exchanges[shortcut] = found.seconds["all-to-all"]
    # Sixteen pairs of layers, each as two blocks by hand; what is recomputed goes forward twice.
    pair = Pair(
        tokens=8192,
        sequence=4096,
        width=c.hidden_size,
        attention=c.hidden_size,
        kv=c.num_key_value_heads * (c.hidden_size // c.num_attention_heads),
        dense=c.intermediate_size,
        experts=8,
        hidden=c.intermediate_size,
        k=2,
    )
    waits = exposed(pair, 8, machine, True)
    assert waits["forward"] > 0
    expected = 16 * (2 * waits["forward"] + waits["backward"])
    assert exchanges[True] == pytest.approx(expected, rel=1e-3)
    # Without, nothing runs meanwhile: six times one way in each of 32 layers.
    assert exchanges[False] == pytest.approx(32 * 6 * pair.seconds(8, machine)["exchange"], rel=1e-6)
    # DeepSeek's shared expert hides tokens on their way there.
    known = facts(meta("deepseek_v3"))
    found = estimate(known, Sizes(expert=64, shard=4), work, machine)
    assert found.seconds["all-to-all"] < found.sent["all-to-all"] / machine.bandwidth(64)


@pytest.mark.parametrize(("experts", "k", "parts"), [(8, 2, 4), (64, 6, 8), (5, 2, 5), (4, 4, 2), (8, 1, 1)])
def test_a_token_goes_to_as_many_processes_as_drawing_says(experts: int, k: int, parts: int) -> None:
    from zoo.parallel.plan_facts import Stack

    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(4000)])
    holder = chosen // -(-experts // parts)
    met = torch.zeros(4000, parts).scatter(1, holder, 1.0)
    found = remote_processes(Stack(experts, ((experts, 2, 2),), k, 2), parts)
    assert found == pytest.approx(float(met[:, 1:].sum(1).mean()) if parts > 1 else 0.0, rel=0.03)


def test_the_command_ranks_meshes_and_says_what_one_takes(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "mixtral_8x7b.yaml")
    assert main(["plan", "--config", config, "--gpus", "64", "--gpu-memory", "80"]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "memory, optimizer" in shown
    assert "sent, all-to-all" in shown
    assert main(["plan", "--config", config, "--gpus", "64", "--expert", "8", "--tensor", "2"]) == 0
    assert "each process of replicate 1, shard 4, expert 8, tensor 2:" in capsys.readouterr().out
    assert main(["plan", "--config", config, "--gpus", "4", "--gpu-memory", "16"]) == 0
    assert "no mesh of 4 GPUs of 16 GB is enough" in capsys.readouterr().out


def test_frozen_weights_take_what_they_are_kept_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's model: in bfloat16 two bytes each and no more, in few bits those of the codes and scales."""
    whole = zoo.create_model("language/mixtral_tiny", **SMALL)
    zoo.save_pretrained(whole, tmp_path / "base")
    text = f"model: {{pretrained: {tmp_path}/base, overrides: {{dtype: bfloat16}}, convert: [%s]}}"
    adapt = "{adapt: {kind: LoRA, dtype: float32}}"
    memory = {}
    for name, convert in (("whole", adapt), ("coded", "{quantise: {format: int8}}, " + adapt)):
        (tmp_path / "it.yaml").write_text(text % convert)
        known, work = read(tmp_path / "it.yaml")
        memory[name] = estimate(known, Sizes(), work, Machine()).memory
        assert main(["plan", "--config", str(tmp_path / "it.yaml"), "--gpus", "1"]) == 0
        assert "memory, optimizer" in capsys.readouterr().out
    adapted = zoo.adapt(zoo.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), "LoRA", dtype="float32")
    few = zoo.quantise(adapted, "int8")
    learns = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for name, model in (("whole", adapted), ("coded", few)):
        tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers()) if "inv_freq" not in name}
        rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
        assert memory[name]["parameters"] == sum(tensors.values()) - rotary
        assert (memory[name]["gradients"], memory[name]["optimizer"]) == (4 * learns, 8 * learns)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--config", "nothing.yaml", "--gpus", "8"], "nothing.yaml"),
        (["--config", str(CONFIGS / "mixtral_8x7b.yaml"), "--gpus", "6", "--expert", "4"], "6 processes cannot be"),
        (["--config", str(CONFIGS / "mixtral_8x7b.yaml"), "--gpus", "7", "--expert", "7"], "8 experts leave some"),
        (["--config", str(CONFIGS / "mixtral_8x7b.yaml"), "--gpus", "5", "--shard", "5"], "28672 rows do not divide"),
        (["--config", str(CONFIGS / "mixtral_8x7b.yaml"), "--gpus", "16", "--tensor", "16"], "8 heads do not divide"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected sections model, data and trainer, got NoneType"),
        ("model: {network: language/mixtral_tiny", "is not YAML"),
        ("model: [3]", "a plan needs model.network"),
        ("model: {network: recommendation/mmoe}", "expected a model of language or vision, got recommendation/mmoe"),
        ("model: {pretrained: nowhere/there/is}", "nowhere/there/is: no such folder"),
        ("model: {network: vision_language/limoe_tiny}", "expected a model of language or vision, got vision_language"),
        ("model: {network: language/mixtral_tiny}\ndata: [1]", "expected data to be a section with options, got [1]"),
        ("model: {network: language/mixtral_tiny}\ndata: {batch_size: -3}", "data.batch_size: expected a whole number"),
        ("model: {network: vision/vmoe_tiny_test}\ndata: {batch_size: many}", "at least 1, got 'many'"),
        (
            "model: {network: language/mixtral_tiny}\ntrainer: {accumulate_grad_batches: 0}",
            "trainer.accumulate_grad_batches: expected a whole number of at least 1, got 0",
        ),
        ("model: {network: language/mixtral_tiny, convert: [{prun: {}}]}", "unknown conversion 'prun'"),
        ("model: {network: language/mixtral_tiny, convert: [share_depth]}", "share weights, which no mesh lays out"),
        ("model: {network: vision/swin_moe_tiny_test}", "layers that see equally many tokens"),
    ],
)
def test_a_configuration_that_cannot_be_planned_is_one_line(
    content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(content)
    assert main(["plan", "--config", str(path), "--gpus", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_plan_is_of_the_converted_model(tmp_path: Path) -> None:
    path, models = tmp_path / "model.yaml", []
    for convert in ("[]", "[{prune: {keep: 4}}]"):
        path.write_text(f"model: {{network: language/mixtral_tiny, convert: {convert}}}")
        models.append(read(path)[0])
    whole, half = models
    assert [stack.experts for stack in half.stacks] == [4] * len(whole.stacks)
    assert half.active == whole.active - len(half.stacks) * 4 * half.width  # a row of each gate an expert


def test_a_plan_is_of_what_the_task_builds(tmp_path: Path) -> None:
    """Classes, image size and channels count; a checkpoint goes before a network's name, as in training."""
    path = tmp_path / "model.yaml"
    path.write_text("model: {network: vision/vmoe_tiny_test, num_classes: 1000}\ndata: {image_size: 64, channels: 1}")
    known, work = read(path)
    whole = zoo.create_model("vision/vmoe_tiny_test", num_classes=1000, img_size=64, in_chans=1)
    assert local_parameters(known, Sizes()) == sum(p.numel() for p in whole.parameters())
    assert work.sequence == (64 // 8) ** 2
    path.write_text("model: {upcycle: {model: vit_tiny_patch16_224, layers: [11], num_experts: 4}, num_classes: 10}")
    mlp = 2 * 192 * 768 + 192 + 768
    assert local_parameters(read(path)[0], Sizes()) == 5_526_346 + 3 * mlp + 4 * 192  # of ViT-Ti/16; three copies; gate
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", **SMALL), tmp_path / "small")
    path.write_text(f"model: {{network: language/mixtral_8x7b, pretrained: {tmp_path}/small}}")
    small = zoo.create_model("language/mixtral_tiny", **SMALL)
    assert local_parameters(read(path)[0], Sizes()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(("precision", "kept"), [("32", 4), ("bf16-mixed", 4), ("bf16-true", 2)])
def test_what_is_kept_of_a_number_is_what_the_precision_says(precision: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"model: {{network: language/mixtral_tiny}}\ntrainer: {{precision: {precision}}}")
    work = read(path)[1]
    assert (work.parameter, work.gradient, work.state) == (kept, kept, 2 * kept)  # AdamW's two moments


@pytest.mark.parametrize("option", ["--gpus", "--expert", "--gpus-per-node", "--top", "--gpu-memory", "--gpu-tflops"])
@pytest.mark.parametrize("value", ["0", "-8", "nan", "many"])
def test_sizes_are_positive_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config", str(CONFIGS / "mixtral_tiny.yaml"), *([] if option == "--gpus" else ["--gpus", "8"])]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *args, f"{option}={value}"])
    assert f"argument {option}: expected a" in capsys.readouterr().err
