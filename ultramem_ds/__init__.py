"""ultramem_ds: pre-train UltraMem language models (arXiv 2411.12364) with DeepSpeed."""

__version__ = "0.1.0"
