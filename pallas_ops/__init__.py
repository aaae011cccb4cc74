"""The modulated convolution of StyleGAN2 and the FIR resampling around it."""

from pallas_ops.cells import pack, unpack
from pallas_ops.convolution import conv2d, downsample_conv2d, up_conv2d
from pallas_ops.modulated_conv import (
    activated_conv2d,
    fused_leaky_relu,
    modulated_conv2d,
    output_packing,
    pick_implementation,
)
from pallas_ops.upfirdn import downsample2d, upfirdn2d, upsample2d, upsample_planes

__all__ = [
    "activated_conv2d",
    "conv2d",
    "downsample2d",
    "downsample_conv2d",
    "fused_leaky_relu",
    "modulated_conv2d",
    "output_packing",
    "pack",
    "pick_implementation",
    "unpack",
    "up_conv2d",
    "upfirdn2d",
    "upsample2d",
    "upsample_planes",
]
