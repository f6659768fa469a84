"""What "module:attribute" names, imported when it is asked for; the one place where a text becomes code."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from .errors import RelodError, SettingsError
from .packages import raised

__all__ = ["load_attribute"]


def load_attribute(path: str, what: str) -> Any:
    """Import "module:attribute".

    Raises:
        SettingsError: the text has another form, the module or something it needs is missing, the module fails as it
            is imported, or it has no such attribute; the message begins with `what` and says which of these it was.
    """
    module_name, colon, attribute = path.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise SettingsError(f"{what}: {path!r} is not of the form module:attribute", "for example my_robot.task:ENTRY")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise SettingsError(f"{what}: there is no module {missing!r}", f"{path!r} was asked for") from error
        raise SettingsError(
            f"{what}: {module_name} needs the module {missing!r}, which is not installed", f"install {missing}"
        ) from error
    except RelodError:
        raise
    except (Exception, SystemExit) as error:  # a module that ends the program is no better than one that fails
        hint = "mend the package; --debug shows the traceback"
        raise SettingsError(f"{what}: importing {module_name} raised {raised(error)}", hint) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"did you mean {module_name}:{close[0]}?" if close else f"look into {module_name}"
        raise SettingsError(f"{what}: module {module_name!r} has no attribute {attribute!r}", hint) from error
