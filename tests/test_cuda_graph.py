"""Promises of support/cuda_graph.py. A stand-in for CUDA's graphs on a CPU replays into fixed memory as they do; what only a GPU
can show is skipped without one."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SMALL, randomize
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import muon
import train_vae
from adversarial import make_discriminator
from config import PRESETS, SDConfig
from support.checkpoint import parameters_of
from support.cuda_graph import WARM_UP, record_cuda_graph
from support.devices import checkpoint_blocks, make_autocast, maybe_compile
from support.processes import World
from train_unet import batch_gradients
from training import clip_gradients, make_optimizer, optimizer_step
from unet import TimeEmbedding, UNetLatent
from vae import AutoencoderKL

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class FakeGraph:
    """Runs a Python function again at replay, into the memory that its outputs and gradients had when it was recorded."""

    def __init__(self):
        self.function, self.inputs, self.memory = None, None, None

    def replay(self):
        kept = [p.grad for p in self.parameters]
        results = self.results()
        for there, new in zip(self.memory, results):
            there.copy_(new)
        for p, gradient in zip(self.parameters, kept):
            p.grad = gradient

    def results(self):
        output = self.function(*self.inputs)
        return [there for there in (output, *(p.grad for p in self.parameters)) if there is not None]


class KernelGraph(TorchDispatchMode):
    """Notes the kernels of a recording, which changes nothing, and runs them at replay, in the memory that they had then.

    As with CUDA, what Python decides it decides once, and nothing may be read back or drawn at random.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.before = [], {}

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        name, kwargs = kernel._schema.name.removeprefix("aten::"), kwargs or {}
        if name in ("_local_scalar_dense", "nonzero", "equal") or name.startswith(("rand", "bernoulli", "normal")):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for t in tree_leaves((args, kwargs)) if kernel._schema.is_mutable else ():
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        output = kernel(*args, **kwargs)
        self.kernels.append((kernel, args, kwargs, output))
        return output

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for kernel, args, kwargs, output in self.kernels:
            schema = kernel._schema
            if schema.is_mutable or not any(r.alias_info for r in schema.returns):  # no view
                for there, new in zip(tree_leaves(output), tree_leaves(kernel(*args, **kwargs))):
                    if isinstance(there, torch.Tensor) and there is not new:
                        there.detach().copy_(new)


class FakeGenerator:
    state = "recording"

    def clone_state(self):
        return "new"

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.fixture
def fake_cuda(monkeypatch):
    """-> make(function, parameters): record_cuda_graph() as on CUDA, but by FakeGraph; and what it calls, and where that leaves CUDA.

    Where function.fails is set, its kernels cannot be recorded, and then ending the recording fails too.
    """
    cuda = {"stream": "main", "generator": FakeGenerator(), "pools": []}

    @contextlib.contextmanager
    def graph_context(graph, pool):
        cuda["pools"].append(pool)
        cuda["graph"], cuda["stream"] = graph, "side"
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture_end") from None
        finally:
            cuda.pop("graph")
        cuda["stream"] = "main"

    for name, value in {"CUDAGraph": FakeGraph, "graph": graph_context, "graph_pool_handle": object,
                        "device": lambda device: contextlib.nullcontext(), "current_device": lambda: 0,
                        "current_stream": lambda: cuda["stream"], "set_stream": lambda s: cuda.update(stream=s),
                        "default_generators": [cuda["generator"]]}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def make(function, parameters):
        calls = []

        def noted(*tensors):
            output, graph = function(*tensors), cuda.get("graph")
            calls.append("recorded" if graph else "run")
            if graph:
                graph.function, graph.inputs, graph.parameters = function, tensors, parameters
                graph.memory = [there for there in (output, *(p.grad for p in parameters)) if there is not None]
                if getattr(function, "fails", False):
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return output

        return record_cuda_graph(noted, "cuda", parameters), calls, cuda

    return make


@pytest.fixture
def recorded(monkeypatch):
    """-> the KernelGraphs that record_cuda_graph() has made, which it now does for a CPU too."""
    made, original = [], record_cuda_graph
    for name, value in {"CUDAGraph": lambda: made.append(KernelGraph()) or made[-1], "graph": lambda graph, pool: graph,
                        "graph_pool_handle": object, "device": lambda device: contextlib.nullcontext(),
                        "current_stream": object}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (muon, diffusion):
        monkeypatch.setattr(module, "record_cuda_graph", lambda function, device: original(function, "cuda"))
    return made


def quadratic():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def gradients(x):
        w.grad = None
        loss = (w * x).square().sum()
        loss.backward()
        return loss.detach()

    return w, gradients


def test_replays_give_what_the_function_gives_for_every_shape_in_any_order(fake_cuda):
    w, gradients = quadratic()
    replayed, calls, cuda = fake_cuda(gradients, [w])
    generator = torch.Generator().manual_seed(0)
    earlier = []
    for n in [1, 1, 1, 1, 1, 3, 1, 3, 3, 1, 3, 3, 1, 3, 1]:
        x = torch.randn(n, 2, generator=generator)
        loss = replayed(x)
        found = w.grad.clone()
        assert torch.equal(loss, gradients(x)) and torch.equal(found, w.grad)
        earlier.append((loss, loss.clone()))
    assert (
        calls.count("recorded") == 2 and calls.count("run") == 2 * WARM_UP
    )  # a recording per shape, after the warm-up
    assert len(set(cuda["pools"])) == 1
    assert all(torch.equal(loss, then) for loss, then in earlier)  # no replay writes over what was returned before


def test_a_function_that_returns_nothing_can_be_recorded(fake_cuda):
    """As an optimizer's update: what it does is what counts. Numbers among the arguments are compared by value."""
    total = torch.zeros(2)

    def add(times, x):
        total.add_(times * x)

    replayed, calls, _ = fake_cuda(add, [])
    assert [replayed(1, torch.ones(2)) for _ in range(WARM_UP + 1)] == [None] * (WARM_UP + 1)
    before = total.clone()
    replayed(1, torch.full((2,), 5.0))
    assert torch.equal(total, before + 5) and calls.count("recorded") == 1
    replayed(3, torch.ones(2))  # another number: another function, which is not recorded yet
    assert torch.equal(total, before + 8) and calls.count("recorded") == 1


def test_what_cannot_be_recorded_runs_as_it_is_after_one_warning_that_says_why(fake_cuda, capsys):
    w, gradients = quadratic()
    gradients.fails = True
    replayed, calls, cuda = fake_cuda(gradients, [w])
    x = torch.ones(1, 2)
    assert [replayed(x * k).item() for k in range(1, 8)] == [5.0 * k * k for k in range(1, 8)]
    assert calls.count("recorded") == 1 and cuda["stream"] == "main" and cuda["generator"].state == "new"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no CUDA graph" in warning and "not permitted" in warning


def test_a_compiled_model_is_recorded_and_other_batches_as_they_are(fake_cuda, tiny, monkeypatch):
    """Nothing is compiled anew while CUDA records, nor for the smaller last batch of an epoch."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    unet, embed_t = randomize(UNetLatent(tiny)).train(), TimeEmbedding(tiny.time_dim)
    parameters, cpu = [*unet.parameters(), *embed_t.parameters()], torch.device("cpu")
    options = make_optimizer([unet, embed_t], tiny), contextlib.nullcontext, tiny, World(0, 1, cpu)
    compiled = maybe_compile(unet, replace(tiny, compile=True, cache_dir=""), cpu, False, 4)

    def loss_of(model):
        return lambda *inputs: batch_gradients(model, embed_t, *options, len(inputs[0]), *inputs)[0]

    step, calls, _ = fake_cuda(loss_of(compiled), parameters)
    for n in [4, 4, 2, 4, 4, 2, 4, 2, 2, 4, 2, 4]:
        z, target = torch.randn(2, n, *unet.latent_shape)
        inputs = z, target, torch.randint(tiny.timesteps, (n,)), torch.randn(n, 12, tiny.text_dim)
        loss, found = step(*inputs), [p.grad.clone() for p in parameters]
        torch.testing.assert_close(loss, loss_of(unet)(*inputs))
        for p, gradient in zip(parameters, found):
            torch.testing.assert_close(gradient, p.grad)
    assert counter.frame_count == 1 and calls.count("recorded") == 2


@pytest.mark.parametrize("kind, precision", [("vae", "bf16"), ("sharper decoder", "no"), ("unet", "bf16")])
def test_training_has_the_same_bits_recorded(kind, precision, recorded):
    """Gradients, discriminator and its balance, Muon and Adam, where a step that is not finite is skipped as on CUDA."""
    plain, replayed = (trained(kind, precision, replay) for replay in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))
    assert len(recorded) == (5 if kind == "sharper decoder" else 3)  # for each size, and Muon's


def trained(kind, precision, replay):
    """Losses of 16 steps in batches of two sizes, and all that was trained. A sharper decoder begins without the adversary."""
    torch.manual_seed(0)
    sharper = kind == "sharper decoder"
    cfg = replace(
        SDConfig(**SMALL),
        optimizer="muon",
        grad_accumulation=2,
        adversarial_weight=float(sharper),
        matching_weight=20.0 * sharper,
    )
    net, cpu = randomize(UNetLatent(cfg) if kind == "unet" else AutoencoderKL(cfg)), torch.device("cpu")
    checkpoint_blocks(net, precision == "no")
    optimizer = make_optimizer([net], cfg)
    if not replay:
        optimizer.update = optimizer.update_hidden
    options = optimizer, make_autocast(cpu, precision), cfg, World(0, 1, cpu)
    if kind == "unet":
        gradients = partial(batch_gradients, net, lambda t: t[:, None].expand(-1, cfg.time_dim), *options)
    else:
        critic = make_discriminator(cfg, optimizer, cpu)
        adversary = critic and (critic, critic.balance, net.decoder.conv_out.weight)
        gradients = partial(train_vae.batch_gradients, net, None, adversary, *options)
    call, found = gradients, []
    if replay:
        call = record_cuda_graph(gradients, "cuda", parameters_of(optimizer))
    for step in range(16):
        n = 4 if step % 2 else 3
        x, latents = torch.randn(n, 3, 16, 16), torch.randn(2, n, *UNetLatent(cfg).latent_shape)
        inputs = (
            (*latents, torch.rand(n), torch.randn(n, 4, cfg.text_dim))
            if kind == "unet"
            else (x, latents[0], sharper and step > 7)
        )
        loss, grad_norm = call(n, *inputs)
        found += [loss, grad_norm]
        optimizer.found_inf = torch.tensor(float(step == 13))
        optimizer_step(optimizer, 1e-3 * step)
    return [*found, *parameters_of(optimizer), *(critic.state_dict().values() if sharper else ())]


def test_samples_have_the_same_bits_recorded(tiny, recorded, monkeypatch):
    """Guided in a part of the schedule, in which batches are twice as large."""
    unet, embed_t, vae = randomize(UNetLatent(tiny)), TimeEmbedding(tiny.time_dim), AutoencoderKL(tiny)
    nets, process = (
        (unet, vae, embed_t, lambda prompts: torch.ones(len(prompts), 12, tiny.text_dim)),
        diffusion.make_process("flow"),
    )
    options = {
        "process": process,
        "seeds": [1, 2],
        "guidance_scale": 2.6,
        "guidance_interval": (0.3, 0.7),
        "guidance_rescale": 0.5,
    }

    def pictures():
        with torch.autocast("cpu", torch.bfloat16):
            return diffusion.sample(*nets, ["a", "b"], 24, 2, **options)

    replayed = pictures()
    assert len(recorded) == 2
    monkeypatch.setattr(diffusion, "RECORD_FROM", 25)
    assert torch.equal(replayed, pictures()) and len(recorded) == 2


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_get_the_function_itself(device):
    assert record_cuda_graph(len, device) is len


@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unet_step_is_the_same_replayed(checkpointing):
    assert torch.allclose(trained_unet(replay=False), trained_unet(replay=True, checkpointing=checkpointing), rtol=1e-3)


def trained_unet(replay, checkpointing=False):
    """Losses and norms of twenty steps with batches of two sizes in turn, and then of the weights."""
    from diffusion import prediction_loss

    cfg, found = SDConfig(**PRESETS["demo"]), []
    torch.manual_seed(0)
    unet, t_ember = UNetLatent(cfg).cuda(), TimeEmbedding(cfg.time_dim).cuda()
    checkpoint_blocks(unet, checkpointing)
    parameters = [*unet.parameters(), *t_ember.parameters()]
    optimizer = make_optimizer([unet, t_ember], cfg)

    def gradients(z, t, text_emb):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = unet(z, t_ember(t), text_emb)
        loss = prediction_loss(out, z).mean()
        loss.backward()
        return loss.detach(), clip_gradients(optimizer, cfg.max_grad_norm)

    if replay:
        gradients = record_cuda_graph(gradients, "cuda", parameters)
    for step in range(20):
        n = 8 if step % 3 else 5
        z = torch.randn(n, *unet.latent_shape, device="cuda")
        t, text_emb = torch.randint(200, (n,), device="cuda"), torch.randn(n, 12, cfg.text_dim, device="cuda")
        found += gradients(z, t, text_emb)
        optimizer_step(optimizer, 1e-3)
    return torch.stack([*found, *(p.detach().norm() for p in parameters)])


@on_gpu
def test_a_recording_that_fails_leaves_cuda_usable(capsys):
    """Reading a number back cannot be recorded. Afterwards random numbers, which a recording takes from elsewhere, go on."""
    call = record_cuda_graph(lambda x: x * x.sum().item(), "cuda")
    for _ in range(WARM_UP + 3):
        x = torch.randn(3, device="cuda")
        assert torch.allclose(call(x), x * x.sum())
    assert capsys.readouterr().err.count("no CUDA graph") == 1


@on_gpu
def test_group_norm_out_of_sums_is_group_norm():
    from vae import GroupNorm

    torch.manual_seed(0)
    norm = GroupNorm(8, 32, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + torch.randn(4, 32, 16, 16, device="cuda")).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.allclose(torch.compile(norm, dynamic=False)(x), norm(x), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_same_values_in_the_form_that_is_compiled_for_cuda(dtype):
    from vae import GroupNorm, repeat_pixels

    torch.manual_seed(0)
    norm = GroupNorm(8, 32, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + torch.randn(4, 32, 6, 5)).to(dtype).contiguous(memory_format=torch.channels_last)
    precision = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(norm.by_sums(x), torch.nn.functional.group_norm(x.float(), 8, norm.weight, norm.bias, 1e-6).to(dtype),
                          atol=precision, rtol=precision)  # fmt: skip
    repeated = repeat_pixels(x)
    assert torch.equal(repeated, torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert repeated.is_contiguous(memory_format=torch.channels_last)


@on_gpu
def test_samples_are_the_same_replayed():
    """Twelve steps in one go, which replay, and one by one, which do not."""
    from diffusion import guided_denoiser, make_process, sampling_grid

    cfg = SDConfig(**PRESETS["demo"])
    torch.manual_seed(0)
    unet, t_ember = UNetLatent(cfg).cuda(), TimeEmbedding(cfg.time_dim).cuda()
    torch.nn.init.normal_(unet.conv_out.weight)
    process = make_process()
    t = sampling_grid(process, 12)[0]
    text_emb = torch.randn(2, 12, cfg.text_dim, device="cuda")

    def denoiser():
        return guided_denoiser(unet, t_ember, lambda prompts: text_emb[: len(prompts)], ["", ""], process, t, 2.0)

    with torch.no_grad():
        replayed, z = denoiser(), torch.randn(2, *unet.latent_shape, device="cuda")
        for i in range(12):
            expected = denoiser()(z, i)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(replayed(z, i), expected))
            z = z + 0.1 * expected[1]
