"""What vLLM is told, and what is refused, before an engine for one of our models starts."""

from __future__ import annotations

import torch
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ultramem_ds.vllm.settings import exported_settings

logger = init_logger(__name__)


class ServingRules(VerifyAndUpdateConfig):
    """vLLM's hook for a model's own demands on its configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what would not be right; run eagerly; say so where weights are rounded.

        Raises:
            ValueError: for a combination that is not supported, or an unknown ``config.json``.
        """
        exported_settings(vllm_config.model_config.hf_config)  # refuses what is no such model
        for broken, sentence in refusals(vllm_config):
            if broken:
                raise ValueError(sentence)
        compilation = vllm_config.compilation_config
        if compilation.mode != CompilationMode.NONE and not vllm_config.model_config.enforce_eager:
            logger.info_once("UltraMem models run eagerly: no torch.compile, no CUDA graphs.")
        vllm_config.model_config.enforce_eager = True
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        stored = vllm_config.model_config.hf_config.dtype
        if stored == torch.float32 and vllm_config.model_config.dtype != stored:
            logger.warning_once(
                "The exported weights are float32 and are served in %s; --dtype float32 serves "
                "them as they are.",
                str(vllm_config.model_config.dtype).removeprefix("torch."),
            )


def refusals(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """Conditions that are refused, each with its sentence."""
    hf_config = vllm_config.model_config.hf_config
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    return [
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism is not supported: a memory layer reads the input of one block "
            "and is added after a later one, which may lie in another stage; use "
            "--tensor-parallel-size, which shards tables by rows",
        ),
        (
            parallel.enable_expert_parallel,
            "expert parallelism is not supported: experts are sharded over tensor-parallel ranks "
            "by their inner width; leave out --enable-expert-parallel",
        ),
        (
            parallel.use_ubatching,
            "dual-batch overlap is not supported: the query convolution's state belongs to one "
            "batch; leave out --enable-dbo",
        ),
        (
            vllm_config.model_config.quantization is not None,
            f"quantization {vllm_config.model_config.quantization} is not supported: keys and "
            "tables of the memory have no quantized form; leave out --quantization",
        ),
        (
            hf_config.intermediate_size % ranks != 0,
            f"intermediate_size={hf_config.intermediate_size} cannot be split over "
            f"--tensor-parallel-size {ranks}",
        ),
    ]
