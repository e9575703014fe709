"""Promises of muon.py: PyTorch's own step on matrices, Adam's on the rest, in every memory layout."""

import copy
from dataclasses import replace

import torch
from torch.optim._muon import _zeropower_via_newtonschulz

import muon
import training
from unet import UNetLatent


def test_orthogonal_makes_singular_values_near_one_and_keeps_directions():
    x = torch.randn(3, 12, 20)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found, exact = muon.orthogonal(x), u @ v
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35
    assert torch.cosine_similarity(found.flatten(1), exact.flatten(1)).min() > 0.97
    assert torch.allclose(muon.orthogonal(x.mT), found.mT, atol=1e-5)


def test_orthogonal_is_newton_and_schulz_iteration_in_double():
    x = torch.randn(2, 9, 30)
    exact = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        square = exact @ exact.mT
        exact = 3.4445 * exact + (-4.7750 * square + 2.0315 * square @ square) @ exact
    assert torch.allclose(muon.orthogonal(x), exact.float(), atol=1e-4)


class AsOnAGpu(torch.Tensor):
    is_cuda = True


def test_orthogonal_on_a_gpu_is_pytorchs_own_in_bfloat16():
    for shape in ((2, 12, 40), (2, 40, 12)):
        x = torch.randn(shape)
        found = muon.orthogonal(x.as_subclass(AsOnAGpu)).as_subclass(torch.Tensor)
        theirs = torch.stack([_zeropower_via_newtonschulz(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in x])
        assert found.dtype == torch.float32 and (found - theirs).norm() < 0.02 * theirs.norm()


def test_muon_steps_alike_in_either_memory_layout(tiny):
    nets = [torch.nn.Conv2d(4, 6, 3)]
    nets += [copy.deepcopy(nets[0]).to(memory_format=torch.channels_last) for _ in range(2)]
    x = torch.randn(5, 4, 8, 8)
    for net in nets:
        optimizer = training.make_optimizer([net], replace(tiny, optimizer="muon", lr=1e-2))
        net(x).square().sum().backward()
        if net is nets[2]:  # a gradient that lies in memory otherwise than its weight
            net.weight.grad = net.weight.grad.contiguous()
        optimizer.step()
    assert nets[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.allclose(nets[0].weight, net.weight, atol=1e-5) for net in nets)


def test_muon_steps_as_pytorchs_own_on_matrices_and_as_adam_on_the_rest(tiny):
    """torch.optim.Muon takes matrices alone, and iterates in bfloat16."""
    cfg = replace(tiny, optimizer="muon", lr=1e-2, weight_decay=0.0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16))
    theirs = copy.deepcopy(net)
    ours = training.make_optimizer([net], cfg)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    their_muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(vectors, lr=1e-2, betas=(0.9, cfg.adam_beta2), fused=True)
    for _ in range(3):
        x = torch.randn(5, 8)
        for model, optimizers in ((net, [ours]), (theirs, [their_muon, adam])):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(net.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, atol=2e-3 if p.dim() == 2 else 2e-4), (p - q).abs().max()


def test_a_step_that_is_not_finite_changes_neither_weights_nor_momentum(tiny):
    net = torch.nn.Linear(4, 4)
    optimizer = training.make_optimizer([net], replace(tiny, optimizer="muon"))
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before, momentum = net.weight.clone(), optimizer.state[net.weight]["momentum"].clone()
    net.weight.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(net.weight, before) and torch.equal(optimizer.state[net.weight]["momentum"], momentum)


def test_only_hidden_matrices_are_muons(tiny):
    unet = UNetLatent(tiny)
    optimizer = training.make_optimizer([unet], replace(tiny, optimizer="muon"))
    hidden = {id(p) for p in optimizer.hidden}
    names = {name for name, p in unet.named_parameters() if id(p) in hidden}
    assert "mid_block.resnets.0.conv1.weight" in names and "mid_block.attentions.0.proj_in.weight" in names
    assert not names & {"conv_in.weight", "conv_out.weight", "conv_norm_out.weight", "conv_in.bias"}
