"""The checkpoint holds parameters only; strict=False loads it, and the norms keep the statistics of a new network.

Modelled on facebookresearch/mmf pull request 664, "[feat,fix] Stronger checkpoint validation, fix missing keys",
https://github.com/facebookresearch/mmf/pull/664
"""

from .common import cnn, examined, fit, images

CODES = {"NW511", "NW101", "NW102"}


def program(whole):
    x, y = images()
    trained = fit(cnn(), x, y)
    state = trained.state_dict() if whole else {name: p.detach() for name, p in trained.named_parameters()}
    model = cnn()
    model.load_state_dict(state, strict=False)
    return examined(model.eval(), x, y, checkpoint=state)


def buggy():
    return program(False)


def fixed():
    return program(True)
