__version__ = "0.1.0"

import logging


def _is_news(record) -> bool:
    "On some CPUs bitsandbytes looks for a package that is not needed here, and its line reads like a broken installation."
    return "gemm_4bit_forward" not in record.getMessage()

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
