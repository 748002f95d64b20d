"""What clients and containers are told about functions and apps."""

from modal_proto import api_pb2

from tests.modal_cloud.state import App, Function


def metadata_of(function: Function) -> api_pb2.FunctionHandleMetadata:
    """Returns what a client needs to call the function, or the methods of the class."""
    definition = function.definition
    methods = {
        name: api_pb2.FunctionHandleMetadata(
            function_name=method.function_name,
            function_type=method.function_type,
            web_url=method.web_url,
            is_method=True,
            use_method_name=name,
            function_schema=method.function_schema,
            supported_input_formats=method.supported_input_formats,
            supported_output_formats=method.supported_output_formats,
            app_id=function.app.id,
        )
        for name, method in definition.method_definitions.items()
    }
    return api_pb2.FunctionHandleMetadata(
        function_name=definition.function_name,
        function_type=definition.function_type,
        web_url=definition.web_url,
        is_method=definition.is_method,
        definition_id=function.definition_id,
        class_parameter_info=definition.class_parameter_info,
        method_handle_metadata=methods,
        function_schema=definition.function_schema,
        supported_input_formats=definition.supported_input_formats,
        supported_output_formats=definition.supported_output_formats,
        _experimental_flash_urls=definition.flash_service_urls,
        app_id=function.app.id,
        base_function_id=function.base.id if function.base else "",
    )


def data_of(function: Function) -> api_pb2.FunctionData:
    """Returns the definition in the form in which `info()` reads it."""
    ranked = api_pb2.FunctionData.RankedFunction(function=function.definition)
    return api_pb2.FunctionData(ranked_functions=[ranked])


def layout_of(app: App) -> api_pb2.AppLayout:
    """Returns what an app consists of, as its containers and its next deployment are told."""
    layout = api_pb2.AppLayout(
        function_ids={tag: function.id for tag, function in app.functions.items()}, class_ids=app.class_ids
    )
    for function in app.functions.values():
        layout.objects.add(object_id=function.id, function_handle_metadata=metadata_of(function))
    for class_id in app.class_ids.values():
        layout.objects.add(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
    return layout
