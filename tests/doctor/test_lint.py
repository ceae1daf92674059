"""`normwright lint`: what it finds, where it must be silent, how it reads files and what it prints.

Programs mark the lines to be reported by `# !NW905`; a line without a mark must not be reported.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from normwright import cli
from normwright.doctor.lint import FORMATS, all_rules, lint, select, show
from normwright.doctor.page import TITLES, Page
from normwright.lab.errors import UserError

HEAD = """
import copy
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import optim
"""
MODEL = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.drop(x))
"""


def linted(tmp_path, code, name="program.py"):
    path = tmp_path / name
    path.write_text(code, encoding="utf-8")
    return lint([path]).problems


def check(tmp_path, code):
    """The program gets the findings that its marks say, and no others."""
    wanted = {(i, code) for i, line in enumerate(code.splitlines(), 1) for code in re.findall(r"!(NW\d+)", line)}
    found = [(p.line, p.code) for p in linted(tmp_path, code)]
    assert len(found) == len(set(found)), found
    assert set(found) == wanted


# ---- the pages


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_the_example_fires_its_rule_alone_and_what_to_use_instead_none(rule, tmp_path):
    page = rule.page()
    assert [p.code for p in linted(tmp_path, page.example)] == [rule.code]
    assert linted(tmp_path, page.use_instead) == []


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_the_page_is_whole(rule):
    page = rule.page()
    assert page.missing == ()
    assert tuple(page.sections) == TITLES
    assert "\n" not in page.summary
    assert page.summary.endswith(".")
    assert re.fullmatch(r"NW9\d\d", rule.code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", rule.name)
    assert rule.severity in ("error", "warning", "advice")
    assert "http" in page.sections["References"]


def test_a_page_is_read_from_a_docstring():
    page = Page.of(
        """A fault.

        What it does
            Looks.

            Twice.
        Example
            if x:
                y()
        """
    )
    assert page.summary == "A fault."
    assert page.sections["What it does"] == "Looks.\n\nTwice."
    assert page.example == "if x:\n    y()"
    assert page.use_instead == ""
    assert page.missing == ("Why is this bad", "Use instead", "Fix safety", "References")
    assert Page.of(str(page)) == page


# ---- programs

D2L = """
import torch
from torch import nn
from d2l import torch as d2l

def batch_norm(X, gamma, beta, moving_mean, moving_var, eps, momentum):
    if not torch.is_grad_enabled():  # !NW901
        X_hat = (X - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        assert len(X.shape) in (2, 4)
        if len(X.shape) == 2:
            mean = X.mean(dim=0)
            var = ((X - mean) ** 2).mean(dim=0)
        else:
            mean = X.mean(dim=(0, 2, 3), keepdim=True)
            var = ((X - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        X_hat = (X - mean) / torch.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    Y = gamma * X_hat + beta
    return Y, RETURNED

class BatchNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.moving_mean = torch.zeros(shape)  # !NW902
        self.moving_var = torch.ones(shape)

    def forward(self, X):
        if self.moving_mean.device != X.device:
            self.moving_mean = self.moving_mean.to(X.device)
            self.moving_var = self.moving_var.to(X.device)
        Y, self.moving_mean, self.moving_var = batch_norm(  #KEPT
            X, self.gamma, self.beta, self.moving_mean, self.moving_var, eps=1e-5, momentum=0.9)
        return Y
"""

PROGRAMS = {
    "d2l's batch norm": D2L.replace("RETURNED", "moving_mean.data, moving_var.data").replace("#KEPT", ""),
    "d2l's batch norm without data": D2L.replace("RETURNED", "moving_mean, moving_var").replace("#KEPT", "# !NW903"),
    "grad mode through a name": HEAD
    + """
class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer("mu", torch.zeros(n))
        self.register_buffer("s2", torch.ones(n))

    def forward(self, x):
        training = torch.is_grad_enabled()
        if training:  # !NW901
            m, v = x.mean(0), x.var(0, unbiased=False)
            self.mu.mul_(0.9).add_(0.1 * m.detach())
            self.s2.mul_(0.9).add_(0.1 * v.detach())
        else:
            m, v = self.mu, self.s2
        return self.weight * (x - m) * torch.rsqrt(v + 1e-5)
""",
    "grad mode through a parameter": HEAD
    + """
def batch_norm(is_training, x, moving_mean):
    if not is_training:  # !NW901
        return x - moving_mean, moving_mean
    mean = x.mean(0)
    moving_mean = 0.9 * moving_mean + 0.1 * mean.detach()
    return x - mean, moving_mean

def run(x, moving_mean):
    return batch_norm(torch.is_grad_enabled(), x, moving_mean)
""",
    "grad mode given to the functional": HEAD
    + """
class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            torch.is_grad_enabled(), self.momentum)  # the flag is on this line
""".replace(
        "torch.is_grad_enabled(), self.momentum)  # the flag is on this line", "torch.is_grad_enabled())  # !NW901"
    ),
    "grad mode for checkpoints and with training": HEAD
    + """
from torch.utils.checkpoint import checkpoint

class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.block = nn.Linear(n, n)
        self.register_buffer("running_mean", torch.zeros(n))

    def forward(self, x):
        if torch.is_grad_enabled():
            x = checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        if not self.training:
            return x - self.running_mean
        mean = x.mean(0)
        if self.training and torch.is_grad_enabled():
            self.running_mean.lerp_(mean.detach(), 0.1)
        return self.weight * (x - mean)
""",
    "plain statistics in place": HEAD
    + """
class Standardize(nn.Module):
    def __init__(self, n, momentum=0.1):
        nn.Module.__init__(self)
        self.momentum = momentum
        self.scale = torch.nn.Parameter(torch.ones(n))
        self.running_mean = torch.zeros(n)  # !NW902
        self.running_var = torch.ones(n)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                mean = x.mean(dim=(0, 2, 3))
                var = x.var(dim=(0, 2, 3), unbiased=False)
                self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
                self.running_var = torch.lerp(self.running_var, var, self.momentum)
        return self.scale * (x - self.running_mean) / self.running_var.sqrt()
""",
    "plain statistics with other names and a helper": HEAD
    + """
class Whiten(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.g = nn.Parameter(torch.ones(n))
        mu = torch.zeros(n)
        self.mu = mu  # !NW902

    def _update(self, x):
        m = x.detach().mean(0)
        self.mu = self.mu + 0.01 * (m - self.mu)

    def forward(self, x):
        self._update(x)
        return self.g * (x - self.mu)
""",
    "plain statistics through an unknown function": HEAD
    + """
from d2l.norm import batch_norm

class BatchNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))
        self.moving_mean = torch.zeros(n)  # !NW902

    def forward(self, x):
        y, self.moving_mean = batch_norm(x, self.gamma, self.moving_mean)
        return y
""",
    "state that is no statistic, buffers, own care": HEAD
    + """
class Recurrent(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.cell = nn.GRUCell(n, n)
        self.hidden = torch.zeros(1, n)
        self.total = 0.0

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden.detach())
        self.total += x.mean().item()
        return self.hidden

class Good(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))
        self.running_mean: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(n))
        self.running_var = nn.Buffer(torch.ones(n))

    def forward(self, x):
        with torch.no_grad():
            self.running_mean += 0.1 * (x.mean(0) - self.running_mean)
            self.running_var.lerp_(x.var(0), 0.1)
        return self.gamma * (x - self.running_mean) / self.running_var

class Careful(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.running_mean = torch.zeros(n)

    def _apply(self, fn):
        self.running_mean = fn(self.running_mean)
        return super()._apply(fn)

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return x - self.running_mean

class Meter:
    def __init__(self):
        self.running_mean = torch.zeros(3)

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
""",
    "statistics with their graph": HEAD
    + """
class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x):
        if self.training:
            mean = x.mean(0)
            var = x.var(0, unbiased=False)
            momentum = 0.1
            self.running_mean.mul_(1 - momentum).add_(momentum * mean)  # !NW903
            self.running_var = self.running_var * (1 - momentum) + momentum * var  # !NW903
        else:
            mean, var = self.running_mean, self.running_var
        return self.weight * (x - mean) / torch.sqrt(var + 1e-5)
""",
    "a layer without parameters inside a network": HEAD
    + """
class MeanOnly(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("avg", torch.zeros(n))

    def forward(self, x):
        m = torch.mean(x, dim=0)
        self.avg = 0.9 * self.avg + 0.1 * m  # !NW903
        return x - m

net = nn.Sequential(nn.Linear(4, 4), MeanOnly(4), nn.ReLU())
""",
    "statistics without their graph, in eight ways": HEAD
    + """
class Base(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer("running_mean", torch.zeros(n))

class A(Base):
    def forward(self, x):
        mean = x.mean(0)
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        return x - mean

class B(Base):
    def forward(self, x):
        mean = x.mean(0)
        self.running_mean.copy_((0.9 * self.running_mean + 0.1 * mean).detach())
        return x - mean

class C(Base):
    def forward(self, x):
        self.update(x)
        return x - self.running_mean

    @torch.no_grad()
    def update(self, x):
        self.running_mean.mul_(0.9).add_(x.mean(0), alpha=0.1)

class D(Base):
    def forward(self, x):
        mean = x.mean(0)
        self.running_mean.data.mul_(0.9).add_(0.1 * mean.data)
        return x - mean

class E(Base):
    def forward(self, x):
        mean = x.mean(0)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        self.running_mean = self.running_mean.detach()
        return x - mean

class G(Base):
    def forward(self, x):
        batch = x.detach()
        self.running_mean = 0.9 * self.running_mean + 0.1 * batch.mean(0)
        return x - self.running_mean

class H(Base):
    def forward(self, x):
        mean = x.mean(0)
        running = self.running_mean
        running.data.mul_(0.9).add_(0.1 * mean)
        return x - mean

class Observations(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n))

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
        return x - self.running_mean

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.observations = Observations(4)
        self.net = nn.Sequential(Observations(4), nn.Linear(4, 2))
""",
    "statistics of conditional layers with their graph": HEAD
    + """
class Base(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n))

class Shifted(Base):
    def forward(self, x, shift):
        mean = x.mean(0) if self.training else self.running_mean
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean  # !NW903
        out = x - mean
        out += shift[:, None]
        return out

class Residual(Base):
    def forward(self, x, *, residual):
        mean = x.mean(0)
        self.running_mean.lerp_(mean, 0.1)  # !NW903
        out = residual + (x - mean)
        return out

class Detached(Base):
    def forward(self, x, shift):
        mean = x.mean(0)
        self.running_mean.lerp_(mean.detach(), 0.1)
        return x - mean + shift

class Masked(Base):
    def forward(self, x, mask, eps):
        mean = x.mean(0)
        self.running_mean.lerp_(mean, 0.1)
        return (x - mean) / (x.var(0) + eps) * mask

class Observations(Base):
    def forward(self, x, noise):
        self.running_mean.lerp_(x.mean(0), 0.1)
        return x - self.running_mean + noise
""",
    "softmax into cross-entropy in many ways": HEAD
    + """
from collections import OrderedDict
from torch.nn import CrossEntropyLoss, Sequential
from torch.nn.functional import cross_entropy, softmax as sm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        x = self.body(x)
        x = self.head(x)
        x = self.softmax(x)
        return x

class Trainer:
    def __init__(self, device):
        self.model = Net().to(device)
        self.criterion = CrossEntropyLoss(label_smoothing=0.1)

    def step(self, x, y):
        out = self.model(x)
        return self.criterion(out, y)  # !NW904

seq = nn.DataParallel(Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)))
layers = [nn.Linear(4, 8), nn.ReLU()]
layers.append(nn.Linear(8, 3))
layers.append(nn.Softmax(dim=1))
grown = nn.Sequential(*layers)
ordered = nn.Sequential(OrderedDict([("fc", nn.Linear(4, 3)), ("softmax", nn.Softmax(dim=1))]))
mean = torch.randn(2, 4)
y = torch.zeros(2).long()
a = cross_entropy(sm(seq(mean), dim=1), y)  # !NW904
b = F.cross_entropy(input=seq(mean), target=y)  # !NW904
probs = mean.softmax(-1)
c = nn.CrossEntropyLoss()(probs.float(), y)  # !NW904
d = F.cross_entropy(grown(mean), y)  # !NW904

g = F.cross_entropy(ordered(mean), y)  # !NW904

def train(model, criterion):
    return criterion(model(mean), y)  # !NW904

train(Net(), nn.CrossEntropyLoss())

def leaving(x, raw):
    out = F.softmax(x, dim=1)
    if raw:
        out = x
        return out
    return F.cross_entropy(out, y)  # !NW904

def two(x):
    logits = x * 2
    return logits, F.softmax(logits, dim=1)

logits, probabilities = two(mean)
e = F.cross_entropy(probabilities, y)  # !NW904
f = F.cross_entropy(logits, y)
""",
    "softmax that is right": HEAD
    + """
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.fc(x)
        if not self.training:
            x = F.softmax(x, dim=1)
        return x

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.softmax = nn.Softmax(1)

    def forward(self, x):
        logits = self.fc(x)
        return logits, self.softmax(logits)

    def predict(self, x):
        return self.softmax(self.fc(x))

class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v

class LogNet(nn.Sequential):
    pass

x, y = torch.randn(2, 4), torch.zeros(2).long()
F.cross_entropy(Classifier()(x), y)
logits, probs = Both()(x)
F.cross_entropy(logits, y)
F.cross_entropy(Attention()(x, x, x), y)
F.cross_entropy(F.log_softmax(x, dim=1), y)
nn.CrossEntropyLoss()(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1))(x), y)
F.nll_loss(F.log_softmax(x, dim=1), y)
nn.NLLLoss()(torch.log(F.softmax(x, dim=1)), y)
F.cross_entropy(x, F.softmax(x * 2, dim=1))
F.cross_entropy(torch.log(F.softmax(x, dim=1)), y)
F.kl_div(F.log_softmax(x, 1), F.softmax(x, 1))
F.log_softmax(F.log_softmax(x, 1), 1)
out = F.softmax(x, dim=1)
out = x
F.cross_entropy(out, y)
for mode in range(2):
    scores = x
    loss = F.cross_entropy(scores, y)
    scores = F.softmax(scores, dim=1)

def evaluate(model, softmax=True):
    out = model(x)
    loss = F.cross_entropy(out, y)
    if softmax:
        out = out.softmax(1)
    return loss, out
""",
    "sigmoid and nll": HEAD
    + """
class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 1, 4), nn.Sigmoid())

    def forward(self, x):
        return self.main(x).view(-1)

critic = Critic()
bce = nn.BCEWithLogitsLoss()
x, y = torch.randn(2, 3, 4, 4), torch.zeros(2)
bce(critic(x), y)  # !NW915
F.binary_cross_entropy_with_logits(x.sigmoid(), y)  # !NW915
nn.BCELoss()(critic(x), y)
bce(x, torch.sigmoid(y))
bce(torch.logit(torch.sigmoid(x)), y)
nll = nn.NLLLoss()
nll(nn.Softmax(dim=1)(x), y)  # !NW916
F.nll_loss(torch.log_softmax(x, 1), y)
""",
    "missing zero_grad": HEAD
    + MODEL
    + """
model = Net()
optimizer = optim.Adam(model.parameters(), lr=1e-3)
scheduler = optim.lr_scheduler.StepLR(optimizer, 10)
for epoch in range(10):
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # !NW905
    scheduler.step()
""",
    "missing zero_grad in a trainer and with a scaler": HEAD
    + """
class Trainer:
    def __init__(self, model, lr):
        self.model = model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.scaler = torch.amp.GradScaler()

    def train_step(self, batch):
        loss = self.model(batch).mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # !NW905
        self.scaler.update()
        return loss.item()

    def fit(self, loader):
        for batch in loader:
            self.train_step(batch)
""",
    "zero_grad once an epoch or once at all": HEAD
    + """
def train(model, loader, opt, criterion):
    opt.zero_grad()
    for x, y in loader:
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()  # !NW905

def epochs(model, loader, optimizer, criterion):
    for epoch in range(3):
        optimizer.zero_grad()
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()  # !NW905
""",
    "a gradient step by hand without zeroing": HEAD
    + """
w = torch.randn(3, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
for i in range(100):
    loss = ((X @ w + b - y) ** 2).mean()
    loss.backward()
    with torch.no_grad():
        w -= 0.1 * w.grad  # !NW905
        b -= 0.1 * b.grad
""",
    "one of two optimizers is never zeroed": HEAD
    + """
G, D = nn.Linear(4, 4), nn.Linear(4, 1)
opt_g = optim.Adam(G.parameters())
opt_d = optim.Adam(D.parameters())
for x in loader:
    opt_d.zero_grad()
    (D(x).mean() - D(G(x).detach()).mean()).backward()
    opt_d.step()
    g_loss = D(G(x)).mean()
    g_loss.backward()
    opt_g.step()  # !NW905
""",
    "zeroed gradients in many ways": HEAD
    + """
def sgd(params, lr, batch_size):
    with torch.no_grad():
        for param in params:
            param -= lr * param.grad / batch_size
            param.grad.zero_()

def hand(w, X, y):
    for _ in range(3):
        ((X @ w - y) ** 2).mean().backward()
        sgd([w], 0.1, 10)

def none(model, loader, optimizer):
    for x, y in loader:
        for p in model.parameters():
            p.grad = None
        F.mse_loss(model(x), y).backward()
        optimizer.step()

def accumulate(model, loader, optimizer, k=4):
    for i, (x, y) in enumerate(loader):
        (F.mse_loss(model(x), y) / k).backward()
        if (i + 1) % k == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

def whole_epoch(model, loader, optimizer):
    for epoch in range(3):
        optimizer.zero_grad()
        for x, y in loader:
            F.mse_loss(model(x), y).backward()
        optimizer.step()

def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def through(model, loader, optimizer):
    for x, y in loader:
        update(optimizer, F.mse_loss(model(x), y))

def closure(model, loader, optimizer):
    for x, y in loader:
        def again():
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss
        optimizer.step(again)

def elsewhere(model, loader, optimizer):
    from engine import reset
    for x, y in loader:
        reset(optimizer)
        F.mse_loss(model(x), y).backward()
        optimizer.step()

def engine(model_engine, loader):
    for x in loader:
        loss = model_engine(x)
        model_engine.backward(loss)
        model_engine.step()

def single(model, x, optimizer):
    model(x).sum().backward()
    optimizer.step()

def environment(env, policy, optimizer):
    for t in range(10):
        state, reward = env.step(policy(state))
    loss = -reward.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def adversarial(model, x, y, eps):
    for _ in range(10):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), y).backward()
        x.data += eps * x.grad.sign()

def inner(model, tasks):
    for task in tasks:
        clone = copy.deepcopy(model)
        opt = optim.SGD(clone.parameters(), lr=0.1)
        clone(task).sum().backward()
        opt.step()

def gan(G, D, loader, opt_g, opt_d):
    for x in loader:
        D.zero_grad()
        D(x).mean().backward()
        opt_d.step()
        G.zero_grad()
        D(G(x)).mean().backward()
        opt_g.step()

def several(optimizers, model, loader):
    for x in loader:
        for opt in optimizers:
            opt.zero_grad()
        model(x).sum().backward()
        for opt in optimizers:
            opt.step()

class Own(optim.Optimizer):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)
                p.grad.zero_()

def own(model, loader):
    opt = Own(model.parameters(), {})
    for x in loader:
        model(x).sum().backward()
        opt.step()
""",
    "losses that keep their graph": HEAD
    + """
def train(model, loader, optimizer, criterion):
    model.train()
    total_loss, losses, history = 0.0, [], {"loss": []}
    for epoch in range(3):
        running = 0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total_loss += loss  # !NW906
            running = running + loss * x.size(0)  # !NW906
            losses.append(loss)  # !NW906
            history["loss"].append(loss.mean())  # !NW906
        print(running)
    return total_loss / len(loader)

class Module:
    def fit(self, loader):
        for x, y in loader:
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            self.epoch_loss += loss  # !NW906
            loss.backward()
            self.optimizer.step()
""",
    "losses that keep their graph, differentiated otherwise": HEAD
    + """
def mixed(model, loader, optimizer, scaler, accelerator):
    a, b, c = 0, 0, 0
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        a += loss  # !NW906
    for i, (x, y) in enumerate(loader):
        loss = F.mse_loss(model(x), y)
        (loss / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        b = b + loss  # !NW906
    for x, y in loader:
        optimizer.zero_grad()
        first, second = F.mse_loss(model(x), y), model(x).abs().mean()
        accelerator.backward(first + 0.1 * second)
        optimizer.step()
        c += first.item() + second  # !NW906
    return a, b, c
""",
    "losses without their graph": HEAD
    + """
from collections import deque

def train(model, loader, optimizer, criterion, meter):
    total, n, numbers, last = 0.0, 0, [], deque(maxlen=10)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item() * x.size(0)
        total += float(loss)
        total += loss.detach()
        total += loss.data
        numbers.append(loss.detach().cpu())
        numbers.append(loss.cpu().data.numpy())
        n += len(loss)
        last.append(loss)
        meter.update(loss)
        loss = loss.item()
        total += loss
        numbers.append(loss)
    return total / n

def several(model, loader, optimizer):
    for x, y in loader:
        optimizer.zero_grad()
        loss = 0
        parts = []
        for t in range(5):
            part = F.mse_loss(model(x[t]), y[t])
            loss += part
            parts.append(part)
        loss = loss + torch.stack(parts).sum()
        loss.backward()
        optimizer.step()

def accumulated(model, loader, optimizer):
    total = 0
    for x in loader:
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward(retain_graph=True)
        total += loss
        optimizer.step()
    total.backward()

class Particles:
    def fit(self, model, loader, optimizer, weight=0.5):
        total, weights, k = 0, 0, len(loader)
        for x in loader:
            optimizer.zero_grad()
            loss = model(x).sum()
            (weight * loss / self.particles / k).backward()
            optimizer.step()
            total += loss.item() / self.particles
            weights += weight / k

@torch.no_grad()
def evaluate(model, loader, criterion):
    total = 0
    for x, y in loader:
        total += criterion(model(x), y)
    return total
""",
    "train mode is not restored": HEAD
    + MODEL
    + """
def evaluate(net, loader):
    net.eval()
    correct = 0
    with torch.no_grad():
        for x, y in loader:
            correct += (net(x).argmax(1) == y).sum().item()
    return correct

def main(train_loader, test_loader):
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for epoch in range(10):
        for i, (x, y) in enumerate(train_loader):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        print(evaluate(model, test_loader))
""".replace("net.eval()", "net.eval()  # !NW907"),
    "train mode is restored only between epochs": HEAD
    + MODEL
    + """
model = Net()
optimizer = optim.SGD(model.parameters(), lr=0.1)
for epoch in range(10):
    model.train()
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i % 100 == 0:
            model.eval()  # !NW907
            with torch.no_grad():
                print(model(x_val).argmax(1).eq(y_val).float().mean())
""",
    "train mode is not restored in a trainer": HEAD
    + """
from torchvision import models

class Trainer:
    def __init__(self, model, train_loader, test_loader):
        self.model = model.to("cuda")
        self.optimizer = optim.SGD(model.parameters(), lr=0.1)
        self.train_loader, self.test_loader = train_loader, test_loader

    def train_epoch(self):
        for x, y in self.train_loader:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()

    def validate(self):
        self.model.eval()  # !NW907
        return sum((self.model(x).argmax(1) == y).sum().item() for x, y in self.test_loader)

    def fit(self, epochs):
        self.model.train()
        for _ in range(epochs):
            self.train_epoch()
            self.validate()

Trainer(models.resnet18(num_classes=10), [], []).fit(3)
""",
    "a network of torchvision": HEAD
    + """
from torchvision.models import resnet18, alexnet

def step(model, loader):
    optimizer = optim.Adam(model.parameters())
    for x, y in loader:
        loss = nn.CrossEntropyLoss().cuda()(model(x), y)
        loss.backward()
        optimizer.step()  # !NW905

model = resnet18(weights=None)
model.fc = nn.Linear(512, 10)
print(model(torch.randn(1, 3, 224, 224)).shape)  # !NW908
step(model, loader)
with torch.no_grad():
    for x, y in loader:
        print((model(x).argmax(1) == y).sum())  # !NW910
""",
    "a Lightning module": HEAD
    + """
import pytorch_lightning as pl

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(dim=-1))
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        out = self(x)
        return self.loss(out, y)  # !NW904

    def configure_optimizers(self):
        return optim.Adam(self.parameters())
""",
    "train mode that is right": HEAD
    + MODEL
    + """
from engine import train_one_epoch

def train(model, loader, optimizer):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

def test(model, loader):
    model.eval()
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).sum() for x, y in loader)

def main(loader):
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(10):
        train(model, loader, optimizer)
        test(model, loader)
    test(model, loader)

def kept(model, loader, optimizer):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            model(x)
        model.train(was_training)

def teacher(student, teacher, loader, optimizer):
    for x, y in loader:
        optimizer.zero_grad()
        teacher.eval()
        with torch.no_grad():
            target = teacher(x)
        F.mse_loss(student(x), target).backward()
        optimizer.step()

def frozen(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        model.eval()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

def frozen_norms(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()

def last(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i == 100:
            model.eval()
            break

def outside(model, loader, optimizer):
    for epoch in range(3):
        train_one_epoch(model, loader, optimizer)
        test(model, loader)

def modeless(loader):
    mlp = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = optim.SGD(mlp.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.mse_loss(mlp(x), y).backward()
        optimizer.step()
        mlp.eval()
        with torch.no_grad():
            print(mlp(x))
""",
    "probing before training": HEAD
    + MODEL
    + """
def train(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

model = Net().to("cuda")
dummy = torch.randn(2, 1, 28, 28).cuda()
out = model(dummy)  # !NW908
print(out.shape)
train(model, loader)

def main(loader):
    net = Net()
    with torch.no_grad():
        net(torch.zeros(2, 1, 28, 28))  # !NW908
    train(net, loader)
""",
    "probing a part of what is trained": HEAD
    + MODEL
    + """
from collections import OrderedDict

class Whole(nn.Module):
    def __init__(self, body, width):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x))

class Features(Whole):
    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)

def train(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

def of_a_class(loader):
    body = Net()
    width = body(torch.zeros(2, 1, 28, 28)).shape[1]  # !NW908
    model = Whole(width=width, body=body).to("cuda")
    train(model, loader)

def on_the_way(loader):
    body = Net()
    body = body.to("cuda")
    body(torch.zeros(2, 1, 28, 28))  # !NW908
    train(Whole(body.train(), 10), loader)

def ordered(loader):
    body = Net()
    body(torch.zeros(2, 1, 28, 28))  # !NW908
    body = nn.Sequential(OrderedDict([("body", body), ("head", nn.Linear(10, 10))]))
    train(body, loader)

def build():
    body = Net()
    width = body(torch.zeros(2, 1, 28, 28)).shape[1]  # !NW908
    return nn.DataParallel(nn.Sequential(body, nn.Linear(width, 10)))

def of_a_caller(loader):
    model = build().to("cuda")
    train(model, loader)

def restored(loader):
    body = Net()
    body(torch.zeros(2, 1, 28, 28))
    model = nn.Sequential(body, nn.Linear(10, 10))
    model.load_state_dict(torch.load("x.pt"))
    train(model, loader)

def features(loader):
    body = Net()
    body(torch.zeros(2, 1, 28, 28))
    model = Features(body, 10)
    train(model, loader)

def another(loader):
    body = Net()
    width = body(torch.zeros(2, 1, 28, 28)).shape[1]
    model = nn.Sequential(body, nn.Linear(width, 10))
    model = nn.Sequential(Net(), nn.Linear(width, 10))
    train(model, loader)

def read_only(loader):
    body = Net()
    width = body(torch.zeros(2, 1, 28, 28)).shape[1]
    model = nn.Sequential(Net(), nn.Linear(body.width, 10), copy.deepcopy(body))
    train(model, loader)

def tested():
    body = Net()
    width = body(torch.zeros(2, 1, 28, 28)).shape[1]
    return nn.Sequential(body, nn.Linear(width, 10))

def evaluated(loader):
    model = tested()
    for x, y in loader:
        model(x)
""",
    "probing that does no harm": HEAD
    + MODEL
    + """
def train(model, loader):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

def evaluating(loader):
    net = Net()
    net.eval()
    net(torch.zeros(2, 1, 28, 28))
    net.train()
    train(net, loader)

def of_a_copy(loader):
    net = Net()
    shape = copy.deepcopy(net)(torch.zeros(2, 1, 28, 28)).shape
    train(net, loader)

def loaded(loader):
    net = Net()
    net(torch.zeros(2, 1, 28, 28))
    net.load_state_dict(torch.load("x.pt"))
    train(net, loader)

def without_norm(loader):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    net(torch.zeros(2, 1, 28, 28))
    train(net, loader)

def lazy(loader):
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    net(torch.zeros(2, 1, 28, 28))
    train(net, loader)

def real(loader):
    net = Net()
    net(next(iter(loader))[0])
    train(net, loader)

def untrained():
    net = Net()
    print(net(torch.randn(2, 1, 28, 28)).shape)
""",
    "averaged weights": HEAD
    + MODEL
    + """
from torch.optim.swa_utils import AveragedModel, SWALR

def train(loader):
    model = Net()
    swa_model = AveragedModel(model)  # !NW909
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        swa_model.update_parameters(model)
    swa_model.eval()
    return swa_model
""",
    "weights averaged by hand": HEAD
    + """
def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

model = build()
ema = copy.deepcopy(model)
target = copy.deepcopy(model)
ema.eval()

def update(decay):
    with torch.no_grad():
        for a, p in zip(ema.parameters(), model.parameters()):  # !NW909
            a.mul_(decay).add_(p, alpha=1 - decay)
        for p, t in zip(model.parameters(), target.parameters()):
            t.data = decay * t.data + (1 - decay) * p.data
""",
    "weights averaged by hand with their buffers": HEAD
    + """
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
ema = copy.deepcopy(model).eval()
ema.eval()
for a, p in zip(ema.parameters(), model.parameters()):
    a.data.lerp_(p.data, 0.01)
for a, p in zip(ema.buffers(), model.buffers()):
    a.copy_(p)
""",
    "probing as the network is made": HEAD
    + """
class Features(nn.Module):
    def __init__(self, shape, norm):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(shape[0], 8, 3), norm(8), nn.ReLU())
        self.plain = nn.Sequential(nn.Conv2d(shape[0], 8, 3), nn.ReLU())
        self.normed = nn.Sequential(nn.Conv2d(shape[0], 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.plain(torch.zeros(1, *shape))
        self.conv(torch.zeros(1, *shape))
        self.fc = nn.Linear(self._size(shape), 10)

    def _size(self, shape):
        return self.normed(torch.zeros(1, *shape)).numel()  # !NW908

    def forward(self, x):
        return self.fc(self.normed(x).flatten(1))

net = Features((1, 28, 28), nn.BatchNorm2d)
opt = optim.Adam(net.parameters())
for x, y in loader:
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
""",
    "averaged weights with buffers": HEAD
    + MODEL
    + """
from torch.optim import swa_utils

def train(model=Net()):
    ema = swa_utils.AveragedModel(model, use_buffers=True)
    ema.update_parameters(model)
    return ema
""",
    "averaged weights without batch norm": HEAD
    + """
from torch.optim.swa_utils import AveragedModel

model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
ema = AveragedModel(model)
ema.update_parameters(model)
""",
    "scored in training mode": HEAD
    + MODEL
    + """
def main(train_loader, test_loader):
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        correct = 0
        for x, y in test_loader:
            out = model(x)  # !NW910
            correct += (out.argmax(1) == y).sum()
""",
    "samples of a generator in training mode": HEAD
    + """
G = nn.Sequential(nn.ConvTranspose2d(100, 8, 4), nn.BatchNorm2d(8), nn.Tanh())
D = nn.Sequential(nn.Conv2d(8, 8, 4), nn.BatchNorm2d(8), nn.Flatten())
fixed_noise = torch.randn(64, 100, 1, 1)
opt = optim.Adam(G.parameters())
for i, x in enumerate(loader):
    opt.zero_grad()
    D(G(torch.randn(64, 100, 1, 1))).mean().backward()
    opt.step()
    if i % 100 == 0:
        with torch.no_grad():
            fake = G(fixed_noise).cpu()
""",
    "scored without a mode": HEAD
    + """
model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
optimizer = optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
with torch.no_grad():
    for x, y in loader:
        print((model(x).argmax(1) == y).float().mean())
""",
    "one backward is no training": HEAD
    + MODEL
    + """
net = Net()
x = torch.randn(2, 1, 28, 28)
loss = net(x).sum()
loss.backward()
assert net(x).shape == (2, 10)
""",
    "momentum and eps": HEAD
    + """
from functools import partial

BN_MOMENTUM = 0.99
KERAS = 0.9997
a = nn.BatchNorm2d(8, momentum=0.9)  # !NW911
b = nn.BatchNorm1d(8, 1e-3, BN_MOMENTUM)  # !NW911
c = partial(nn.BatchNorm2d, momentum=0.95)  # !NW911
d = nn.BatchNorm2d(8, momentum=1 - KERAS)
e = nn.BatchNorm2d(8, momentum=1.0)
f = nn.BatchNorm2d(8, momentum=None)
g = nn.BatchNorm2d(8, momentum=0.9, track_running_stats=False)
h = optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
i = nn.BatchNorm2d(8, 0.8)  # !NW914
j = nn.InstanceNorm2d(8, eps=0.1)  # !NW914
k = nn.BatchNorm2d(8, 1e-5, 0.1)
l = nn.GroupNorm(8, 64)
m = nn.SyncBatchNorm(8, eps=1e-3, momentum=0.01)

def make(momentum=0.99, bn=nn.BatchNorm2d):
    return bn(8, momentum=momentum)
""",
    "layers made in forward": HEAD
    + """
class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3)
        self.norm = None

    def forward(self, x):
        x = nn.BatchNorm2d(x.shape[1]).to(x.device)(self.conv(x))  # !NW912
        fc = nn.Linear(8, 8)  # !NW912
        self.bn = nn.BatchNorm2d(8)  # !NW912
        x = self.bn(x)
        if self.norm is None:
            self.norm = nn.BatchNorm2d(8)
        x = self.norm(x)
        x = nn.ReLU()(x)
        x = nn.BatchNorm2d(8, affine=False, track_running_stats=False)(x)
        return nn.LayerNorm(x.shape[1:])(fc(x))

class Maker(nn.Module):
    def forward(self, n):
        return nn.BatchNorm2d(n)

def forward(n):
    return nn.Linear(n, n)(torch.zeros(n))
""",
    "statistics as parameters": HEAD
    + """
class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(n))  # !NW913
        self.running_var = nn.Parameter(torch.ones(n), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * x.mean(0))
                self.running_var.mul_(0.9).add_(0.1 * x.var(0))
        return self.weight * (x - self.running_mean) / self.running_var

class Functional(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(n))  # !NW913
        self.register_buffer("v", torch.ones(n))

    def forward(self, x):
        return F.batch_norm(x, self.m, self.v, training=self.training)

class Learned(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return x - self.mean
""",
    "dropout and the mode": HEAD
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = F.dropout(x, p=0.2)  # !NW917
        x = F.dropout2d(self.fc(x))  # !NW917
        x = F.dropout(x, 0.5, self.training)
        x = F.dropout(x, training=True)
        x = F.dropout(x, 0.0)
        if self.training:
            x = F.dropout(x)
        return F.dropout(x, **self.options)

class Prenet(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)

def augment(x):
    return F.dropout(x, 0.1)
""",
    "layers in a plain list": HEAD
    + """
class Plain(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.convs = [nn.Conv2d(8, 8, 3) for _ in range(n)]  # !NW918
        self.norms = {"a": nn.BatchNorm2d(8), "b": nn.BatchNorm2d(8)}  # !NW918
        self.acts = [nn.ReLU(), nn.ReLU()]

    def forward(self, x):
        for conv in self.convs:
            x = self.acts[0](self.norms["a"](conv(x)))
        return x

class Registered(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = [nn.Linear(8, 8) for _ in range(n)]
        self.net = nn.Sequential(*self.layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

class Named(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = [nn.Linear(8, 8) for _ in range(n)]
        for i, layer in enumerate(self.layers):
            self.add_module(f"layer{i}", layer)

    def forward(self, x):
        return self.layers[0](x)

class Hidden(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = [teacher]

    def forward(self, x):
        return self.teacher[0](x)
""",
    "layers put into a plain list one by one": HEAD
    + """
class Appended(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.convs = list()  # !NW918
        self.norms = {}  # !NW918
        acts = []
        linears = []
        for i in range(n):
            conv = nn.Conv2d(8, 8, 3)
            nn.init.zeros_(conv.bias)
            self.convs.append(conv)
            self.norms[i] = nn.BatchNorm2d(8)
            acts.append(nn.ReLU())
            linears.append(nn.Linear(8, 8))
        self.acts = acts
        self.linears = linears  # !NW918

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = self.norms[i](conv(x))
        for linear in reversed(self.linears):
            x = linear(x)
        return self.acts[0](x)

class Known(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.order = []
        self.order.append(self.first)
        self.second = second = nn.Linear(8, 8)
        self.order.append(second)
        third = nn.Linear(8, 8)
        self.views = []
        self.views.append(third)
        self.third = third
        layers = []
        for _ in range(n):
            layers.append(nn.Linear(8, 8))
        self.layers = layers
        self.net = nn.Sequential(*layers)
        self.moved = []
        self.moved.append(nn.Linear(8, 8))
        self.moved = nn.ModuleList(self.moved)
        self.unpacked = []
        self.unpacked.append(nn.Linear(8, 8))
        self.net2 = nn.Sequential(*self.unpacked)
        self.seen = []

    def forward(self, x):
        for layer in self.order + self.layers + self.views + self.unpacked:
            x = layer(x)
        self.seen.append(x)
        return self.net(x)

class HandedOn(Registry, nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = []
        for _ in range(n):
            self.layers.append(nn.Linear(8, 8))
        self.register_layers(self.layers)

    def forward(self, x):
        return self.layers[0](x)

class Given(nn.Module):
    def __init__(self, teachers):
        super().__init__()
        self.teachers = []
        for teacher in teachers:
            self.teachers.append(teacher)

    def add(self, layer):
        self.teachers.append(nn.Linear(8, 8))

    def forward(self, x):
        return self.teachers[0](x)
""",
    "names that only look like torch's": """
import torch
import mylib.functional as F
from mylib import nn

class Net(nn.Module):
    def __init__(self):
        self.norm = nn.BatchNorm2d(8, 0.8, momentum=0.99)

    def forward(self, x):
        return F.dropout(x)

def loss(F, x, y):
    return F.cross_entropy(F.softmax(x, 1), y)
""",
    "star imports": """
import torch
from torch.nn import *

norm = BatchNorm2d(8, momentum=0.99)  # !NW911
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, tmp_path):
    compile(PROGRAMS[name], name, "exec")
    check(tmp_path, PROGRAMS[name])


# ---- reading files

FAULT = "from torch import nn\nnorm = nn.BatchNorm2d(8, momentum=0.99)\n"


def codes(result):
    return [p.code for p in result.problems]


def test_folders_are_searched_and_the_usual_ones_passed_over(tmp_path):
    for name in ("a.py", "pkg/b.py", "pkg/deep/c.pyw", ".venv/d.py", "node_modules/e.py", "build/f.py", ".git/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(FAULT)
    (tmp_path / "notes.txt").write_text(FAULT)
    found = lint([tmp_path]).problems
    assert [p.path.relative_to(tmp_path).as_posix() for p in found] == ["a.py", "pkg/b.py", "pkg/deep/c.pyw"]
    assert codes(lint([tmp_path / "notes.txt", tmp_path / "build"])) == ["NW911", "NW911"]  # as they were named
    assert lint([tmp_path / "a.py", tmp_path / "a.py"]).files == 1


def test_a_path_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no file or folder .*nowhere"):
        lint([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("raw", "column"),
    [
        (b"# -*- coding: latin-1 -*-\nfrom torch import nn\ns = '\xe9'; n = nn.BatchNorm2d(8, momentum=0.99)\n", 41),
        ("\ufefffrom torch import nn\ns = 'é–'; n = nn.BatchNorm2d(8, momentum=0.99)\n".encode(), 42),
        ("from torch import nn\r\ns = 'é'; n = nn.BatchNorm2d(8, momentum=0.99)\r\n".encode(), 41),
        (b"from torch import nn\rs = 'e'; n = nn.BatchNorm2d(8, momentum=0.99)\r", 41),
        ("from torch import nn\ns = '\x0c\u2028'; n = nn.BatchNorm2d(8, momentum=0.99)\n".encode(), 42),
    ],
    ids=["latin-1", "byte order mark", "windows", "old mac", "other separators"],
)
def test_encodings_and_line_ends(raw, column, tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(raw)
    (problem,) = lint([path]).problems
    assert problem.code == "NW911"
    assert problem.text[problem.column - 1 : problem.end_column - 1] == "0.99"
    assert problem.column == column


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"import torch\ndef f(:\n", "invalid syntax"),
        (b"import torch\nx = '\xff'\n", "cannot be decoded"),
        (b"# coding: nonsense\nimport torch\n", "cannot be decoded"),
        (b"import torch\nx = '\0'\n", "null bytes"),
        (b"import torch\nx = " + b"(" * 5000 + b")" * 5000, "parenthes|nested|parsed|syntax"),
    ],
    ids=["syntax", "not utf-8", "unknown encoding", "null", "too deep"],
)
def test_a_file_that_cannot_be_read_is_one_problem_and_the_next_file_is_read(raw, message, tmp_path):
    (tmp_path / "a.py").write_bytes(raw)
    (tmp_path / "b.py").write_text(FAULT)
    first, second = lint([tmp_path]).problems
    assert (first.code, second.code) == ("NW900", "NW911")
    assert re.search(message, first.message)
    assert "\n" not in first.message


def test_deep_expressions_are_not_a_crash(tmp_path):
    code = FAULT + "x = " + "+".join(["nn"] * 3000) + "\n" + "y = nn" + ".a" * 900 + "\n"
    assert "NW911" in [p.code for p in linted(tmp_path, code)] or lint([tmp_path]).problems[0].code == "NW900"


def test_code_that_never_says_torch_is_not_parsed(tmp_path):
    assert linted(tmp_path, "def f(:\n") == []
    assert linted(tmp_path, "") == []


def notebook(*cells):
    listed = [{"cell_type": kind, "source": source.splitlines(keepends=True), "metadata": {}} for kind, source in cells]
    return json.dumps({"cells": listed, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_notebooks(tmp_path):
    code = notebook(
        ("markdown", "import torch\nthis is not code"),
        ("code", "%matplotlib inline\n!pip install torch\nimport torch\nfrom torch import nn\nfiles = !ls\n"),
        ("code", "%%bash\nfor x in; do echo; done"),
        ("code", "def broken(:\n    pass"),
        ("code", "%%time\nif True:\n    %timeit 1\nnorm = nn.BatchNorm2d(8, momentum=0.99)\nnorm?"),
        ("code", "other = nn.BatchNorm2d(8, momentum=0.99)  # noqa: NW911"),
        ("code", "await_ = await something()"),
    )
    first, second = linted(tmp_path, code, "a.ipynb")
    assert (first.code, first.cell, first.line) == ("NW900", 4, 1)
    assert (second.code, second.cell, second.line, second.column) == ("NW911", 5, 4, 35)
    text = show(lint([tmp_path]))
    assert "a.ipynb:cell 5:4:35: NW911" in text
    (wrong,) = linted(tmp_path, "torch", "b.ipynb")
    assert (wrong.code, wrong.message) == ("NW900", "is not a notebook of format 4")


def test_notebook_cells_know_what_earlier_cells_define(tmp_path):
    code = notebook(
        ("code", HEAD + MODEL),
        ("code", "model = Net()\noptimizer = optim.SGD(model.parameters(), lr=0.1)"),
        ("code", "for x, y in loader:\n    F.cross_entropy(model(x), y).backward()\n    optimizer.step()"),
    )
    (problem,) = linted(tmp_path, code, "a.ipynb")
    assert (problem.code, problem.cell, problem.line) == ("NW905", 3, 3)


# ---- silencing and choosing


@pytest.mark.parametrize(
    ("comment", "silent"),
    [
        ("# noqa", True),
        ("#noqa", True),
        ("# NOQA:NW911", True),
        ("# noqa: E501, NW911", True),
        ("# noqa: NW911 on purpose", True),
        ("# type: ignore  # noqa: nw911", True),
        ("# noqa: NW905", False),
        ("# noqa: E501", False),
        ("# nothing", False),
    ],
)
def test_noqa(comment, silent, tmp_path):
    code = f"from torch import nn\nnorm = nn.BatchNorm2d(8, momentum=0.99)  {comment}\n"
    assert [p.code for p in linted(tmp_path, code)] == ([] if silent else ["NW911"])


def test_noqa_on_the_last_line_of_a_statement(tmp_path):
    page = next(rule for rule in all_rules() if rule.code == "NW904").page()
    one = page.example.replace(
        "criterion(net(batch), labels)", "criterion(\n        net(batch),\n    labels)  # noqa: NW904"
    )
    assert linted(tmp_path, one) == []
    assert [p.code for p in linted(tmp_path, one.replace("noqa: NW904", ""))] == ["NW904"]


def test_select_and_ignore():
    every = {rule.code for rule in all_rules()}
    assert {rule.code for rule in select()} == every
    assert {rule.code for rule in select(["NW905", "reversed-momentum"])} == {"NW905", "NW911"}
    assert {rule.code for rule in select(["nw90"])} == {code for code in every if code.startswith("NW90")}
    assert {rule.code for rule in select(["NW9"], ["NW905"])} == every - {"NW905"}
    with pytest.raises(UserError, match="No rule is called 'NW999'"):
        select(["NW999"])
    with pytest.raises(UserError, match="No rule is called"):
        select([], ["E501"])


# ---- what is printed


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(FAULT + "other = nn.BatchNorm2d(8, 0.8)\n")
    return lint(["a.py"])


def test_text(result):
    lines = show(result).splitlines()
    assert lines[0].startswith("a.py:2:35: NW911 momentum=0.99 weighs the new batch")
    assert lines[2] == "  2 | norm = nn.BatchNorm2d(8, momentum=0.99)"
    assert lines[3].index("^") - lines[2].index("0.99") == 0
    assert lines[3].count("^") == len("0.99")
    assert lines[4] == "    = help: momentum=0.01"
    assert lines[-1] == "Found 2 problems."
    assert show(lint([])) == "All checks passed!"


def test_json(result):
    first, second = json.loads(show(result, "json"))
    assert (first["code"], first["name"], first["severity"]) == ("NW911", "reversed-momentum", "warning")
    assert first["filename"] == "a.py"
    assert first["location"] == {"row": 2, "column": 35}
    assert first["end_location"] == {"row": 2, "column": 39}
    assert (second["code"], second["cell"]) == ("NW914", None)
    assert json.loads(show(lint([]), "json")) == []


def test_sarif(result):
    log = json.loads(show(result, "sarif"))
    (run,) = log["runs"]
    assert log["version"] == "2.1.0"
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["NW900", *(rule.code for rule in all_rules())]
    first = run["results"][0]
    assert rules[first["ruleIndex"]]["id"] == first["ruleId"] == "NW911"
    assert first["level"] == "warning"
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "a.py"
    assert place["region"] == {"startLine": 2, "startColumn": 35, "endLine": 2, "endColumn": 39}
    assert json.loads(show(lint([]), "sarif"))["runs"][0]["results"] == []


def test_github(result):
    first, _ = show(result, "github").splitlines()
    place = "file=a.py,line=2,col=35,endLine=2,endColumn=39"
    assert first.startswith(f"::warning title=normwright (NW911),{place}::NW911 momentum=0.99")
    Path("100%,a:b.py").write_text(FAULT)
    assert "file=100%25%2Ca%3Ab.py," in show(lint(["100%,a:b.py"]), "github")
    assert set(FORMATS) == {"text", "json", "sarif", "github"}


# ---- the command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["normwright", "lint", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_exit_codes(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.py").write_text("import torch\n")
    (tmp_path / "bad.py").write_text(FAULT)
    assert command(monkeypatch, capsys, tmp_path / "good.py") == (0, "All checks passed!\n", "")
    code, out, _ = command(monkeypatch, capsys, tmp_path)
    assert (code, out.splitlines()[-1]) == (1, "Found 1 problem.")
    assert command(monkeypatch, capsys, "--ignore", "NW911,NW905", tmp_path)[0] == 0
    assert command(monkeypatch, capsys, "--select", "NW905", tmp_path)[0] == 0
    code, out, err = command(monkeypatch, capsys, tmp_path / "nowhere")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, _, err = command(monkeypatch, capsys, "--format", "xml", tmp_path)
    assert (code, err) == (2, "normwright: --format is one of text, json, sarif, github; got 'xml'.\n")
    assert command(monkeypatch, capsys, "--select", "X", tmp_path)[0] == 2
    (tmp_path / "empty").mkdir()
    code, out, err = command(monkeypatch, capsys, tmp_path / "empty")
    assert (code, err) == (0, "normwright: no Python file or notebook there.\n")


def test_nothing_of_the_user_is_run(tmp_path):
    """In a process of its own: a file that would fail, write and import is only read."""
    mark = tmp_path / "mark"
    code = f"import torch\nopen({str(mark)!r}, 'w').close()\nimport nowhere\nraise SystemExit(7)\n"
    (tmp_path / "torch_train.py").write_text(textwrap.dedent(code))
    ended = subprocess.run(
        [sys.executable, "-m", "normwright", "lint", "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "All checks passed!\n"), ended.stderr
    assert not mark.exists()


def test_this_package_is_clean():
    assert lint([Path(cli.__file__).parent]).problems == []


@pytest.mark.slow
def test_torchvision_and_timm_are_clean():
    """Every finding there was looked at by hand; none was a fault of theirs."""
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    assert lint([Path(timm.__file__).parent, Path(torchvision.__file__).parent]).problems == []


def test_the_hooks_for_pre_commit_name_the_command():
    text = (Path(__file__).parents[2] / ".pre-commit-hooks.yaml").read_text()
    assert re.findall(r"^- id: (.*)$", text, re.MULTILINE) == ["normwright-lint", "normwright-lint-installed"]
    assert re.findall(r"^  entry: (.*)$", text, re.MULTILINE) == ["normwright lint"] * 2
