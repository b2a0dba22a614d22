"""Small layers shared by the mixers, and the role of every parameter.

Shapes: B batch, T time, D model, N heads, H head width.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

Role = Literal["matrix", "embedding", "head", "low_rank", "router", "vector", "decay"]
"""What the optimizer needs to know of a parameter.

`matrix`: hidden matrices, also stacked ones (Muon, weight decay); `embedding` and `head`;
`low_rank`: factors of low-rank maps (no decay); `router`: what chooses experts (no decay, stored
in fp32); `vector`: gains, biases, mixing coefficients (no decay); `decay`: the RWKV-7 decay bias,
trained at twice the learning rate as its author does.
"""


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its full name (tied parameters once).

    A module that knows better says so in a class attribute `roles`, a mapping from its own
    parameters' names; otherwise Embedding and Linear weights are embeddings and matrices and
    everything else is a vector.
    """
    roles: dict[str, Role] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        own: dict[str, Role] = getattr(module, "roles", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            role: Role = "vector"
            if name in own:
                role = own[name]
            elif isinstance(module, nn.Embedding):
                role = "embedding"
            elif isinstance(module, nn.Linear) and name == "weight":
                role = "matrix"
            roles[f"{module_name}.{name}" if module_name else name] = role
    return roles
