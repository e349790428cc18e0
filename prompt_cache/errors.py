"""What can be wrong with a schema, or with a choice from one."""


class SchemaError(ValueError):
    """A schema that cannot be used, or a choice of modules and arguments that it does not offer.

    The message says where, what, and the cure. `param` is the request's field that is at fault.
    """

    def __init__(self, message: str, *, param: str = "schema") -> None:
        super().__init__(message)
        self.param = param
