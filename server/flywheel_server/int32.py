"""Holds the upper end of the range of the contract's integers."""

from typing import Final

INT32_MAX: Final = 2**31 - 1
