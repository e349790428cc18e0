"""What the server says of itself and its model: health, the model, its tokens, its limits."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.chat import ChatRoutes
from api.completions.completions import check_vocabulary
from api.completions.generation import Generation
from api.completions.logprobs import token_name
from api.http.bodies import DetokenizeRequest, TokenizeRequest
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.http.read_body import read_json
from longctx.engine_info import CodecChoice
from longctx.text.tokenizer import Tokenizer

# What clients send to be told that there are no embeddings: anything.
EMBEDDINGS_BODY = Body(content={JSON: {"type": "object"}}, required=False)


class StatusRoutes:
    """Tells what is served, and how it is doing."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, chat: ChatRoutes) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.chat = chat
        self.started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Tells whether the engine answers: 200 when it is ready, else 503. Needs no API key."""
        state = self.generation.engine.state
        status = "ok" if state == "ready" else "unavailable"
        return JSONResponse(
            {"status": status, "engine": state}, status_code=200 if state == "ready" else 503
        )

    async def models(self, request: Request) -> Response:
        """Lists the one model that is served, under all of its names, with its limits and what was
        measured on it."""
        names = self.generation.names
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """Returns the served model; 404 for any other name."""
        name = request.path_params["name"]
        self.generation.check_model(name)
        return JSONResponse(self._model(name))

    async def scheduler(self, request: Request) -> Response:
        """Tells who is in line, what steps are predicted to take, and what they took."""
        stats = await self.generation.engine.stats()
        line = stats.scheduler
        return JSONResponse(
            {
                "object": "scheduler",
                "target_step_ms": _ms(line.target_step_seconds),
                "last_step": {
                    "predicted_ms": _ms(line.predicted_seconds),
                    "measured_ms": _ms(line.step_seconds),
                },
                "prediction_error": line.prediction_error,
                "ms_per": {term: 1000 * value for term, value in line.seconds_per.items()},
                "classes": {
                    name: {
                        "running": each.running,
                        "waiting": each.waiting,
                        "prompt_tokens_left": each.prompt_tokens_left,
                        "share_ms_left": _ms(each.share_seconds_left),
                    }
                    for name, each in line.classes.items()
                },
                "tenants": line.tenants,
                "steps": stats.steps,
                "preemptions": stats.preemptions,
            }
        )

    async def tokenize(self, request: Request) -> Response:
        """Returns the token ids of a prompt or of messages, and how many there may be."""
        wanted = await read_json(request, TokenizeRequest)
        self.generation.check_model(wanted.model)
        if wanted.prompt is not None:
            special = wanted.add_special_tokens is not False
            encode = self.tokenizer.encode_completion if special else self.tokenizer.encode
            tokens = await asyncio.to_thread(encode, wanted.prompt)
        else:
            assert wanted.messages is not None
            tools = [each.tool for each in wanted.tools or ()]
            tokens = await self.chat.tokens(wanted.messages, wanted.ending, tools)
        limit = self.generation.engine.info.max_context_tokens
        names = None
        if wanted.return_token_strs:
            names = [token_name(self.tokenizer.token_bytes(token)) for token in tokens]
        return JSONResponse(
            {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": names}
        )

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of tokens; special ones are named in it."""
        wanted = await read_json(request, DetokenizeRequest)
        self.generation.check_model(wanted.model)
        check_vocabulary(wanted.tokens, self.generation.engine.info.vocab_size, param="tokens")
        text = await asyncio.to_thread(self.tokenizer.decode, wanted.tokens, skip_special=False)
        return JSONResponse({"prompt": text})

    async def embeddings(self, request: Request) -> Response:
        """Refuses: the model that is served generates text."""
        raise ApiError(
            400,
            f"{self.generation.served_name!r} generates text and makes no embeddings; ask a server "
            "with an embedding model for them",
            param="model",
            code="unsupported_endpoint",
        )

    def _model(self, name: str) -> dict[str, Any]:
        info = self.generation.engine.info
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "longctx",
            "longctx": {
                "model": info.model_name,
                "max_context_tokens": info.max_context_tokens,
                "capacity_tokens": info.tier_capacity_tokens,
                "block_tokens": info.block_tokens,
                "kv_codec": info.kv_codec,
                "kv_codec_reason": info.codec_choice.reason,
                "kv_codec_forced": info.codec_choice.forced,
                "kv_codec_quality": _quality(info.codec_choice),
                "shiftable": info.shiftable,
                "shiftable_reason": info.shiftable_reason,
                "device": info.device,
                "dtype": info.dtype,
                "dtype_reason": info.dtype_reason,
                "attention_backend": info.backend,
                "vocab_size": info.vocab_size,
            },
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _quality(choice: CodecChoice) -> dict[str, dict[str, float]] | None:
    """Tells what the codec costs the model, for each text measured; None where nothing was."""
    if choice.verdict is None:
        return None
    measured = choice.verdict.measured
    return {
        part: {
            "tokens": damage.rows,
            "kl": damage.kl,
            "kl_error": damage.kl_error,
            "flips": damage.flips,
            "raw_kl": damage.raw_kl,
            "raw_flips": damage.raw_flips,
            "perplexity_rise": damage.perplexity_rise,
        }
        for part, damage in (("text", measured.text), ("own", measured.own))
        if damage is not None
    }
