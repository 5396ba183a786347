import json

import pytest
from jinja2 import UndefinedError

from denserl_cli.pages import embedded, render


def test_text_is_escaped_and_the_page_needs_no_network():
    page = render("base.html.j2", title="<script>alert(1)</script> & more")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "http" not in page


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        render("base.html.j2")


def test_embedded_data_cannot_end_its_script():
    data = {"text": "</script><!-- & \u2028 𝔘 é"}
    written = embedded(data)
    assert not set("<>&\u2028") & set(written)
    assert json.loads(written) == data
