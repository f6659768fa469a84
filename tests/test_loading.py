import pytest

from relod.errors import SettingsError
from relod.loading import load_attribute


def test_what_is_named_is_imported():
    assert load_attribute("relod.loading:load_attribute", "this function") is load_attribute


@pytest.mark.parametrize("path", ["no_colon", "module:", ":attribute", "a b:c", "module:a.b", "a..b:c", "../x:y"])
def test_bad_form(path):
    with pytest.raises(SettingsError, match=r"task 'x': .* is not of the form module:attribute"):
        load_attribute(path, "task 'x'")


def test_no_module():
    with pytest.raises(SettingsError, match=r"there is no module 'relod\.nowhere'"):
        load_attribute("relod.nowhere.deeper:X", "task 'x'")


def test_no_attribute_suggests_one():
    with pytest.raises(
        SettingsError, match=r"has no attribute 'load_attribut'; did you mean relod\.loading:load_attribute\?"
    ):
        load_attribute("relod.loading:load_attribut", "task 'x'")


def test_a_module_that_needs_something_missing_names_that(tmp_path, monkeypatch):
    (tmp_path / "needy_task.py").write_text("import a_missing_sdk\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match="needy_task needs the module 'a_missing_sdk'"):
        load_attribute("needy_task:ENTRY", "task 'needy'")
