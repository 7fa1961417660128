"""The parallelisms and transformations that train.py applies to a model, one file each."""

from parallelize.activation import apply_activation_checkpointing
from parallelize.compile import apply_compile
from parallelize.context import parallelize_context, shard_sequence
from parallelize.expert import parallelize_experts
from parallelize.float8 import apply_float8, sync_float8_scales
from parallelize.fsdp import parallelize_data, set_is_last_backward
from parallelize.init import init_weights, materialize
from parallelize.mesh import ParallelDims, ParallelMesh, build_mesh
from parallelize.pipeline import build_pipeline, parallelize_pipeline
from parallelize.styles import check_parameters
from parallelize.tensor import parallelize_tensor
from parallelize.tied_embedding import TiedEmbedding
