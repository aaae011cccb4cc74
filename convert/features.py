"""Names of the frozen judges in PyTorch files, and ours."""

import numpy as np

# Positions of the convolutions in torchvision's `features` lists.
_CONVOLUTIONS = {
    "alex": (0, 3, 6, 8, 10),
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}


def lpips_params(state, heads):
    """Parameters of `jaxstyle.features.lpips.LPIPS`.

    Args:
      state: torchvision's AlexNet or VGG-16, keys `features.N.weight|bias`.
      heads: the lpips package's file, keys `lin0.model.1.weight` ..

    Returns:
      The net's name, `alex` or `vgg`, and its parameters.
    """
    net = "vgg" if "features.28.weight" in state else "alex"
    params = {}
    for i, place in enumerate(_CONVOLUTIONS[net]):
        params[f"conv_{i}"] = {
            "weight": np.transpose(state[f"features.{place}.weight"], (2, 3, 1, 0)),
            "bias": np.asarray(state[f"features.{place}.bias"]),
        }
    for i in range(5):
        params[f"head_{i}"] = np.reshape(heads[f"lin{i}.model.1.weight"], -1)
    return net, params
