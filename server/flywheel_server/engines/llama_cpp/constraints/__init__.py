"""Constraints of a request, turned into grammars for llama.cpp."""
