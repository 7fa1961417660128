"""One decoder for every model family: correct and readable on one device, no parallelism in it."""

from model.args import ModelArgs
from model.flavors import FLAVORS, get_flavor
from model.flops import flops_per_token, num_params
from model.head import IGNORE_INDEX
from model.mtp import add_mtp_targets
from model.transformer import Transformer
