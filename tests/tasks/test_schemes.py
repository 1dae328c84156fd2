"""Expert pruning and averaging while training: counts, optimizer state, resumption, and what comes out."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint

import zoo
from tasks.averaging import RunningAverage
from tasks.schemes import ExpertAveraging, ExpertPruning, pull
from zoo.moe import MoE
from zoo.moe.routers import RandomRouter


def layers(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


class Watch(pl.Callback):
    """Use of every expert, counted from the gates' decisions on its own, and what a drop changes."""

    def __init__(self):
        self.use, self.before = {}, None

    def setup(self, trainer, task, stage):
        original = task.training_step

        def step(batch, batch_idx):
            with zoo.moe.record(task.model) as kept:
                loss = original(batch, batch_idx)
            for name, (routing,) in kept.routings.items():
                found = routing.dense().detach().double().sum(0)
                self.use[name] = self.use.get(name, 0) + found
            return loss

        task.training_step = step

    def on_train_batch_end(self, trainer, task, *args):
        state = trainer.optimizers[0].state
        self.before = {n: (p.detach().clone(), state[p]["exp_avg"].clone()) for n, p in task.model.named_parameters()}


def test_unused_experts_go_with_their_gate_and_optimizer_state(make, tmp_path):
    watch, pruning = Watch(), ExpertPruning(every_n_steps=3, until_step=100, threshold=0.9)
    task = make.task(router=make.noisy)
    trainer = make.trainer(max_steps=3, callbacks=[watch, pruning])
    pl.seed_everything(0, verbose=False)
    trainer.fit(task, make.data())
    state, numbers = trainer.optimizers[0].state, []
    for i, moe in enumerate(layers(task.model)):
        name = f"layers.{i}.mlp"
        use = next(value for key, value in watch.use.items() if key.endswith(name))
        kept = [e for e in range(4) if use[e] / use.sum() >= 0.9 / 4] or [int(use.argmax())]
        numbers.append(len(kept))
        assert moe.router.num_experts == moe.experts.num_experts == len(kept)
        assert len(moe.router.selection_bias) == len(kept)
        assert moe.router.k == min(2, len(kept))
        for part in ("router.weight", "experts.gate_up_proj", "experts.down_proj"):
            value, moment = next(v for n, v in watch.before.items() if n.endswith(f"{name}.{part}"))
            parameter = moe.get_parameter(part)
            assert torch.equal(parameter, value[kept])
            assert torch.equal(state[parameter]["exp_avg"], moment[kept])
            assert state[parameter]["exp_avg_sq"].shape == parameter.shape
    assert min(numbers) < 4


def test_one_expert_is_left_and_becomes_a_dense_model(make, tmp_path):
    pruning = ExpertPruning(every_n_steps=2, until_step=4, threshold=0.3)
    task = make.task(losses={"switch": 0.01}, export=str(tmp_path / "out"), compile=False)
    make.trainer(max_steps=6, callbacks=[pruning], accumulate_grad_batches=2).fit(task, make.data())
    assert [moe.router.num_experts for moe in layers(task.model)] == [1, 1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_local_experts == theirs.config.num_experts_per_tok == 1
    ids, model = torch.randint(0, 200, (2, 9)), task.model.eval()
    dense = zoo.to_dense(model, method={"expert": 0})
    assert type(dense).__name__ == "MistralForCausalLM"
    for other in (theirs, dense):
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def final(make, folder, steps, resume=None):
    pl.seed_everything(1 if resume is None else 99, verbose=False)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [ExpertPruning(every_n_steps=2, until_step=5, threshold=0.8, by="counts"), saver]
    task = make.task(router=make.noisy)
    trainer = make.trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(task, make.data(), ckpt_path=resume)
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return task, {f"{i}.{k}": v for i, own in optimizer.items() for k, v in own.items()}


def test_a_pruned_run_resumes_bit_for_bit(make, tmp_path):
    straight, optimizer = final(make, tmp_path / "a", 6)
    (checkpoint,) = (tmp_path / "a").glob("*step=3.ckpt")
    sizes = [len(v) for n, v in torch.load(checkpoint, weights_only=False)["state_dict"].items() if "down_proj" in n]
    assert min(sizes) < 4  # what is resumed is smaller than what is built
    resumed, again = final(make, tmp_path / "b", 6, checkpoint)
    assert resumed.model.config.num_local_experts == 1
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert optimizer.keys() == again.keys()
    assert all(torch.equal(optimizer[name], again[name]) for name in optimizer)


def test_experts_are_pulled_to_their_mean_after_every_step_and_merged_in_the_end(make, tmp_path):
    seen = []

    class Around(pl.Callback):
        def on_train_batch_end(self, trainer, task, *args):
            seen.append([p.detach().double().clone() for p in layers(task.model)[0].experts.parameters()])

    class Before(Around):
        pass

    task = make.task(router={"name": "RandomRouter", "train_level": "partition"})
    callbacks = [Before(), ExpertAveraging(0.4, warmup_steps=2), Around()]
    trainer = make.trainer(max_steps=3, callbacks=callbacks, accumulate_grad_batches=2)
    trainer.fit(task, make.data())
    pairs = list(zip(seen[::2], seen[1::2]))
    assert len(pairs) == 6
    for i, rate in enumerate([0.0, 0.2, 0.0, 0.4, 0.0, 0.4]):  # after every second batch, half as much at first
        for before, after in zip(*pairs[i]):
            expected = (1 - rate) * before + rate * before.mean(0, keepdim=True)
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)
    for moe in layers(task.model):
        assert all(torch.equal(p, p[:1].expand_as(p)) for p in moe.experts.parameters())
    dense, ids = zoo.to_dense(task.model).eval(), torch.randint(0, 200, (2, 9))
    torch.testing.assert_close(dense(ids).logits, task.model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_pulling_keeps_the_mean_and_dtype():
    model = zoo.create_model("vision/vmoe_tiny_test", shared_init=False).bfloat16()
    (moe,) = layers(model)
    before = copy.deepcopy(moe.experts)
    pull(model, 0.0)
    assert torch.equal(moe.experts.up_proj, before.up_proj)
    pull(model, 1.0)
    mean = before.up_proj.double().mean(0, keepdim=True)
    assert moe.experts.up_proj.dtype == torch.bfloat16
    torch.testing.assert_close(moe.experts.up_proj.double(), mean.expand(4, -1, -1), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
def test_a_partition_gives_every_expert_as_many_tokens(tokens):
    router = RandomRouter(3, 5, train_level="partition")
    counts = router(torch.randn(tokens, 3)).counts
    assert counts.sum() == tokens
    assert counts.max() - counts.min() <= 1
    first = router(torch.randn(1, 64, 3)).dense().argmax(-1)
    assert not torch.equal(first, router(torch.randn(1, 64, 3)).dense().argmax(-1))


def test_mistakes_are_named(make):
    for make_callback, message in (
        (lambda: ExpertPruning(0, 1), "every_n_steps, until_step and keep of at least 1"),
        (lambda: ExpertPruning(1, 1, by="probs"), "by is 'weight' or 'counts', got 'probs'"),
        (lambda: ExpertAveraging(1.5), "0 <= rate <= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_callback()
    for router, callbacks, message in (
        ("XMoERouter", [ExpertPruning(1, 2)], r"ExpertPruning: .*layers\.0\.mlp: experts of a XMoERouter"),
        (None, [ExpertPruning(1, 2), RunningAverage()], "RunningAverage averages weights whose shapes change"),
        ("GShardRouter", [ExpertPruning(1, 2)], r"ExpertPruning: .*layers\.0\.mlp: GShardRouter chooses two experts"),
    ):
        task = make.task(**({} if router is None else {"router": {"name": router}}))
        with pytest.raises(ValueError, match=message):
            make.trainer(max_steps=1, callbacks=callbacks).fit(task, make.data())
    task = make.task(router={"name": "TopKRouter", "k": 2, "num_groups": 2, "group_topk": 1})
    with pytest.raises(ValueError, match=r"ExpertPruning: .*the gate chooses among 2 groups of experts"):
        make.trainer(max_steps=1, callbacks=[ExpertPruning(1, 2)]).fit(task, make.data())
    task = make.task(export="never")
    with pytest.raises(ValueError, match=r"until_step is 4, but training ends after 3 steps.* expected at most 3"):
        make.trainer(max_steps=3, callbacks=[ExpertPruning(1, 4)]).fit(task, make.data())
    task = make.task(convert=[{"share_depth": {}}])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp and .*layers\.0\.mlp share their weights"):
        make.trainer(max_steps=1, callbacks=[ExpertPruning(1, 2)]).fit(task, make.data())
    task = make.task(overrides={"dense": True})
    with pytest.raises(ValueError, match="ExpertAveraging: the model has no mixture of experts"):
        make.trainer(max_steps=1, callbacks=[ExpertAveraging(0.1)]).fit(task, make.data())


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        ([{"to_dense": {}}, {"upcycle": {"num_experts": 3, "residual": True, "layers": "all"}}], "ResidualExperts"),
        ([{"grow": {"num_new": 1}}], "GrownExperts"),
    ],
)
def test_experts_that_are_more_than_one_stack_are_not_averaged_as_one(convert, kind, make):
    task = make.task(convert=convert)
    with pytest.raises(ValueError, match=f"ExpertAveraging: .*layers.0.mlp has {kind}; expected Experts"):
        make.trainer(max_steps=1, callbacks=[ExpertAveraging(0.5)]).fit(task, make.data())
