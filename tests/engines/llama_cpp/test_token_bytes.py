"""The bytes of tokens: those that llama.cpp has for each token, and joined the bytes of the text."""

from typing import Final

from flywheel_server.engines.llama_cpp.tokenizer import Tokenizer
from flywheel_server.messages import GenerationRequest

from tests.engines.llama_cpp.loaded import Loaded

TEXTS: Final = (
    "Hello, world",
    "  two spaces, and line breaks after it \n\n",
    "Größe 漢字 e\u0301 🦙\u200d🦙\r\n\tcode:\n    def f():\n        return {'a': [1, 2]}\n",
    # Vocabularies may lack control characters: llama.cpp drops bytes that have no token.
    "".join(map(chr, range(ord(" "), 0x300))),
    "▁Ġ<0x0A> <0x0a> \u00a0\u2028\ufffd \U0010ffff",
)


def test_the_joined_bytes_of_a_text_s_tokens_are_the_text(loaded: Loaded) -> None:
    raw = Tokenizer(loaded.llama, loaded.tokenizer._vocabulary, 10**7)
    special = "".join(loaded.special_tokens)
    for text in (*TEXTS, special):
        tokens = raw.tokens(GenerationRequest(text=text, max_tokens=1), lambda: False)
        joined = b"".join(raw.token_bytes(tokens)).decode()
        joined = joined.removeprefix(loaded.model.bos)
        if loaded.model.is_sentencepiece and text is special:
            # SentencePiece adds a space after each special token, and some of these tokens drop it.
            assert joined.replace(" ", "") == text.removeprefix(loaded.model.bos).replace(" ", "")
        elif loaded.model.is_sentencepiece:
            # SentencePiece writes its sign for a space as a space.
            assert joined == " " + text.replace("▁", " ")
        else:
            assert joined == text.removeprefix(loaded.model.bos)


def test_each_token_has_the_bytes_that_llama_has(loaded: Loaded) -> None:
    for text in (*TEXTS, "".join(loaded.special_tokens)):
        found = loaded.llama._request("POST", "/tokenize", {"content": text, "with_pieces": True, "parse_special": True})[
            "tokens"
        ]
        pieces = [token["piece"] for token in found]
        expected = [piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces]
        assert loaded.tokenizer.token_bytes(token["id"] for token in found) == expected
