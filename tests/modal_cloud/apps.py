"""Apps, functions, classes and environments: deployed, looked up, run, stopped."""

import time
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.fleet import Fleet
from tests.modal_cloud.handles import data_of, layout_of, metadata_of
from tests.modal_cloud.registry import DEFAULT_ENVIRONMENT
from tests.modal_cloud.state import App, Function, new_id, not_found
from tests.modal_cloud.tunnels import HOST, Certificates, Relay

IMAGE_BUILDER_VERSION = "2025.06"
WORKSPACE = "stand-in"


class Apps:
    """Plays the RPCs of apps and of what they consist of."""

    def __init__(self, fleet: Fleet, certificates: Certificates) -> None:
        self._fleet = fleet
        self._certificates = certificates
        self._environments = {DEFAULT_ENVIRONMENT: new_id("en")}
        self._apps: dict[str, App] = {}
        self._deployed: dict[tuple[str, str], App] = {}
        self.functions: dict[str, Function] = {}
        self._variants: dict[bytes, Function] = {}

    # Environments

    async def EnvironmentCreate(self, request: api_pb2.EnvironmentCreateRequest) -> Empty:
        self._environments.setdefault(request.name, new_id("en"))
        return Empty()

    async def EnvironmentGetOrCreate(
        self, request: api_pb2.EnvironmentGetOrCreateRequest
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        name = request.deployment_name or DEFAULT_ENVIRONMENT
        if request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            self._environments.setdefault(name, new_id("en"))
        if name not in self._environments:
            raise not_found(f"Environment '{name}' not found")
        settings = api_pb2.EnvironmentSettings(image_builder_version=IMAGE_BUILDER_VERSION)
        metadata = api_pb2.EnvironmentMetadata(name=name, settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id=self._environments[name], metadata=metadata)

    # Apps

    def _app(self, app_id: str) -> App:
        if app_id not in self._apps:
            raise not_found(f"App {app_id} not found")
        return self._apps[app_id]

    def _deployed_app(self, name: str, environment: str) -> App:
        environment = environment or DEFAULT_ENVIRONMENT
        app = self._deployed.get((environment, name))
        if app is None or app.stopped:
            raise not_found(f"App '{name}' not found in environment '{environment}'")
        return app

    async def ClientHello(self, request: Empty) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse(image_builder_version=IMAGE_BUILDER_VERSION)

    async def AppCreate(self, request: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
        environment = request.environment_name or DEFAULT_ENVIRONMENT
        app = App(new_id("ap"), environment, request.description, request.app_state, tags=dict(request.tags))
        self._apps[app.id] = app
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=f"https://modal.com/apps/{WORKSPACE}/{app.id}")

    async def AppGetByDeploymentName(
        self, request: api_pb2.AppGetByDeploymentNameRequest
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        environment = request.environment_name or DEFAULT_ENVIRONMENT
        response = api_pb2.AppGetByDeploymentNameResponse(environment_name=environment)
        if app := self._deployed.get((environment, request.name)):
            response.lifecycle.app_state = app.state
            setattr(response, "previous_app_id" if app.stopped else "app_id", app.id)
        return response

    async def AppGetOrCreate(self, request: api_pb2.AppGetOrCreateRequest) -> api_pb2.AppGetOrCreateResponse:
        environment = request.environment_name or DEFAULT_ENVIRONMENT
        app = self._deployed.get((environment, request.app_name))
        if app is None or app.stopped:
            if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise not_found(f"App '{request.app_name}' not found in environment '{environment}'")
            app = App(new_id("ap"), environment, request.app_name, api_pb2.APP_STATE_DEPLOYED)
            self._apps[app.id] = self._deployed[environment, request.app_name] = app
        metadata = api_pb2.AppHandleMetadata(description=app.description, app_id=app.id, environment_name=environment)
        return api_pb2.AppGetOrCreateResponse(app_id=app.id, handle_metadata=metadata)

    async def AppSetTags(self, request: api_pb2.AppSetTagsRequest) -> Empty:
        self._app(request.app_id).tags = dict(request.tags)
        return Empty()

    async def AppGetTags(self, request: api_pb2.AppGetTagsRequest) -> api_pb2.AppGetTagsResponse:
        return api_pb2.AppGetTagsResponse(tags=self._app(request.app_id).tags)

    async def AppList(self, request: api_pb2.AppListRequest) -> api_pb2.AppListResponse:
        response = api_pb2.AppListResponse()
        for app in self._apps.values():
            if app.environment == (request.environment_name or DEFAULT_ENVIRONMENT):
                running = sum(container.function.app is app for container in self._fleet.live)
                response.apps.add(
                    app_id=app.id,
                    description=app.description,
                    state=app.state,
                    created_at=app.created,
                    n_running_tasks=running,
                    name=app.description,
                )
        return response

    async def TaskList(self, request: api_pb2.TaskListRequest) -> api_pb2.TaskListResponse:
        response = api_pb2.TaskListResponse()
        for container in self._fleet.live:
            app = container.function.app
            if request.app_id in {"", app.id} and app.environment == (request.environment_name or DEFAULT_ENVIRONMENT):
                response.tasks.add(
                    task_id=container.task_id,
                    app_id=app.id,
                    app_description=app.description,
                    started_at=container.started if container.ready else 0,
                )
        return response

    async def AppGetLifecycle(self, request: api_pb2.AppGetLifecycleRequest) -> api_pb2.AppGetLifecycleResponse:
        return api_pb2.AppGetLifecycleResponse(lifecycle=api_pb2.AppLifecycle(app_state=self._app(request.app_id).state))

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest) -> api_pb2.AppGetLayoutResponse:
        return api_pb2.AppGetLayoutResponse(app_layout=layout_of(self._app(request.app_id)))

    async def AppHeartbeat(self, request: api_pb2.AppHeartbeatRequest) -> Empty:
        if self._app(request.app_id).stopped:
            raise GRPCError(Status.FAILED_PRECONDITION, "the app was stopped")
        return Empty()

    async def AppPublish(self, request: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
        app = self._app(request.app_id)
        app.state, app.class_ids, app.tags = request.app_state, dict(request.class_ids), dict(request.tags)
        app.functions = {tag: self.functions[function_id] for tag, function_id in request.function_ids.items()}
        app.version += 1
        self._apps[app.id] = self._apps.pop(app.id)  # the last is the last that was published
        for tag, function in app.functions.items():
            function.tag = tag
            if not (function.definition.is_server and self._fleet.of(function)):
                self._fleet.keep_warm(function)
        if app.state == api_pb2.APP_STATE_DEPLOYED:
            self._deployed[app.environment, request.name] = app
        self._fleet.background(
            self._fleet.retire(app, [function for function in self.functions.values() if function.app is app])
        )
        url = f"https://modal.com/apps/{WORKSPACE}/{app.environment}/deployed/{request.name}"
        return api_pb2.AppPublishResponse(url=url, deployed_at=time.time())

    async def AppStop(self, request: api_pb2.AppStopRequest) -> Empty:
        await self._stop(self._app(request.app_id))
        return Empty()

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest) -> Empty:
        app = self._app(request.app_id)
        if app.state in {api_pb2.APP_STATE_INITIALIZING, api_pb2.APP_STATE_EPHEMERAL}:
            self._fleet.background(self._stop(app))
        return Empty()

    async def _stop(self, app: App) -> None:
        await self._fleet.stop_app(app, [function for function in self.functions.values() if function.app is app])

    async def AppGetLogs(self, request: api_pb2.AppGetLogsRequest) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        app, sent = self._app(request.app_id), int(request.last_entry_id or 0)

        def ended() -> bool:
            return app.stopped and not any(container.function.app is app for container in self._fleet.live)

        def more() -> bool:
            return len(app.logs) > sent or ended()

        while await app.changes.until(more, request.timeout):
            for batch in app.logs[sent:]:
                sent += 1
                yield batch
            if ended():
                yield api_pb2.TaskLogsBatch(app_done=True)
                return

    async def AppFetchLogs(self, request: api_pb2.AppFetchLogsRequest) -> api_pb2.AppFetchLogsResponse:
        since, until = request.since.ToNanoseconds() / 1e9, request.until.ToNanoseconds() / 1e9
        logs = [batch for batch in self._app(request.app_id).logs if since <= batch.items[0].timestamp <= until]
        return api_pb2.AppFetchLogsResponse(batches=logs[-request.limit :])

    # Functions and classes

    async def FunctionPrecreate(self, request: api_pb2.FunctionPrecreateRequest) -> api_pb2.FunctionPrecreateResponse:
        function = self._existing_or_new(request)
        draft = api_pb2.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            webhook_config=request.webhook_config,
            method_definitions=request.method_definitions,
            function_schema=request.function_schema,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        if not function.definition_id:
            self._define(function, draft)
        return api_pb2.FunctionPrecreateResponse(function_id=function.id, handle_metadata=metadata_of(function))

    async def FunctionCreate(self, request: api_pb2.FunctionCreateRequest) -> api_pb2.FunctionCreateResponse:
        function = self._existing_or_new(request)
        ranked = request.function_data.ranked_functions
        self._define(function, ranked[0].function if ranked else request.function)
        definition = function.deployed
        if definition.is_server:
            if function.relay is None:
                context = self._certificates.context(h2=definition.http_config.h2_enabled)
                function.relay = Relay(context, self._fleet.port_of(function))
                function.url = f"https://{HOST}:{await function.relay.open()}"
            definition.flash_service_urls.append(function.url)
        return api_pb2.FunctionCreateResponse(
            function_id=function.id, function=definition, function_data=data_of(function), handle_metadata=metadata_of(function)
        )

    def _existing_or_new(self, request: Any) -> Function:
        app = self._app(request.app_id)
        function_id = request.existing_function_id or new_id("fu")
        return self.functions.setdefault(function_id, Function(function_id, app, ""))

    def _define(self, function: Function, definition: api_pb2.Function) -> None:
        function.deployed = api_pb2.Function()  # containers of the version before keep theirs
        function.deployed.CopyFrom(definition)
        function.definition_id = new_id("de")
        if definition.webhook_config.type:
            label = f"{WORKSPACE}--{function.app.description}-{definition.function_name}".replace("_", "-")
            function.deployed.web_url = f"https://{label}.modal.run"

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
        app = self._deployed_app(request.app_name, request.environment_name)
        function = app.functions.get(request.object_tag)
        if function is None:
            raise not_found(f"Function '{request.object_tag}' not found in app '{request.app_name}'")
        return api_pb2.FunctionGetResponse(
            function_id=function.id, handle_metadata=metadata_of(function), function=data_of(function)
        )

    async def FunctionBindParams(self, request: api_pb2.FunctionBindParamsRequest) -> api_pb2.FunctionBindParamsResponse:
        base = self.functions.get(request.function_id)
        if base is None or base.app.stopped:
            raise not_found(f"Function {request.function_id} not found")
        key = request.SerializeToString(deterministic=True)
        if key not in self._variants:
            variant = Function(
                new_id("fu"),
                base.app,
                base.tag,
                base,
                request.serialized_params,
                request.function_options,
                definition_id=new_id("de"),
            )
            self._variants[key] = self.functions[variant.id] = variant
        variant = self._variants[key]
        return api_pb2.FunctionBindParamsResponse(bound_function_id=variant.id, handle_metadata=metadata_of(variant))

    async def ClassCreate(self, request: api_pb2.ClassCreateRequest) -> api_pb2.ClassCreateResponse:
        return api_pb2.ClassCreateResponse(
            class_id=request.existing_class_id or new_id("cs"), handle_metadata=api_pb2.ClassHandleMetadata()
        )

    async def ClassGet(self, request: api_pb2.ClassGetRequest) -> api_pb2.ClassGetResponse:
        class_id = self._deployed_app(request.app_name, request.environment_name).class_ids.get(request.object_tag)
        if class_id is None:
            raise not_found(f"Class '{request.object_tag}' not found in app '{request.app_name}'")
        return api_pb2.ClassGetResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())

    # What tests look at

    def apps(self) -> list[App]:
        return list(self._apps.values())

    def app_named(self, name: str) -> App:
        """Returns the app of this name that was deployed last; raises KeyError."""
        apps = [app for app in self.apps() if app.description == name]
        if not apps:
            raise KeyError(f"no app named {name} has been deployed")
        return apps[-1]

    def named(self, name: str) -> Function:
        """Returns what `tag` or `app/tag` names, of the app that was deployed last; raises KeyError."""
        app_name, _, tag = name.rpartition("/")
        apps = [app for app in self.apps() if app_name in {"", app.description}]
        functions = [function for app in apps if (function := app.functions.get(tag) or app.functions.get(f"{tag}.*"))]
        if not functions:
            raise KeyError(f"nothing named {name} has been deployed")
        return next((function for function in reversed(functions) if not function.app.stopped), functions[-1])

    def family(self, name: str) -> list[Function]:
        """Returns the named function and its variants."""
        named = self.named(name)
        return [function for function in list(self.functions.values()) if named in {function, function.base}]

    def by_tag(self) -> dict[str, Function]:
        return {tag: function for app in self.apps() for tag, function in app.functions.items()}
