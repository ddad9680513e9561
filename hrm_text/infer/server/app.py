"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel

from hrm_text import __version__
from hrm_text.infer import requests as engine
from hrm_text.infer.server import asking
from hrm_text.infer.server.answering import Answering, ChatAnswering, CompletionAnswering, whole_answer
from hrm_text.infer.server.description import asks, describe_bodies, errors_of
from hrm_text.infer.server.errors import handle_errors, no_such_model
from hrm_text.infer.server.gate import Gate, read_body, unless_gone
from hrm_text.infer.server.page import Page
from hrm_text.infer.server.responses import ChatCompletion, Completion, Health, Model, ModelList
from hrm_text.infer.server.schemas import Body, ChatRequest, CompletionRequest, parse
from hrm_text.infer.server.service import Service
from hrm_text.infer.server.streaming import EventStream


def create_app(service: Service) -> FastAPI:
    """The application of one service; its worker runs already."""
    # No pages of FastAPI's own: they fetch their scripts from elsewhere.
    app = FastAPI(title="hrm-text", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, service=service)
    handle_errors(app)
    page = Page()

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return page.response()

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether requests are taken: 200, or 503."""
        status = service.worker.status
        body = Health(status=service.status, running=status.running, waiting=status.waiting)
        return _json(body, 200 if body.status == "ok" else 503)

    @app.get("/metrics", responses=errors_of(401) | {200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/v1/models", response_model=ModelList, responses=errors_of(401, 503))
    async def models() -> Response:
        """What is served: one model."""
        return _json(ModelList(object="list", data=[_model(service)]))

    @app.get("/v1/models/{name:path}", response_model=Model, responses=errors_of(401, 404, 503))
    async def model(name: str) -> Response:
        """The model of that name."""
        if name != service.name:
            raise no_such_model(name, service.name)
        return _json(_model(service))

    @app.post("/v1/completions", response_model=Completion, **asks(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Answer one prompt or several, each on its own."""
        return await _answer(request, CompletionRequest, asking.completion_requests, CompletionAnswering)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, **asks(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await _answer(request, ChatRequest, asking.chat_requests, ChatAnswering)

    async def _answer(
        request: Request,
        model: type[Body],
        requests_of: Callable[[Body, Service, int], list[engine.Request]],
        answering: type[Answering],
    ) -> Response:
        asked = parse(model, await read_body(request, service.limits))
        service.worker.check_room(asked.num_texts)  # before anything that takes time
        seed = asking.drawn_seed(asked)
        # Long texts take a while to become tokens: not in the event loop.
        requests = await asyncio.to_thread(requests_of, asked, service, seed)
        generation = service.worker.open(requests, service.limits.request_seconds)
        answer = answering(requests, asked.n or 1, seed, service)
        with contextlib.ExitStack() as closing:
            closing.enter_context(generation)
            if asked.stream:
                # An error that comes before the first byte still has a status of its own.
                await unless_gone(request.receive, generation.accepted())
                closing.pop_all()  # the stream closes it
                return EventStream(
                    generation, answer, bool(asked.stream_options and asked.stream_options.include_usage)
                )
            return _json(await unless_gone(request.receive, whole_answer(generation, answer)))

    describe_bodies(app, service)
    return app


def _model(service: Service) -> Model:
    config = service.model.config
    return Model(
        id=service.name,
        created=service.created,
        parameters=config.num_parameters,
        context=config.max_position_embeddings,
        conditions=service.conditions,
        default_condition=service.condition,
        has_cycles=bool(config.H_cycles),
        h_cycles=config.H_cycles,
        l_cycles=config.L_cycles,
        max_calls=config.num_calls,
    )


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")
