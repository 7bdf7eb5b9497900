"""Tokens and their roles, and files that are read again, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.caller import HIGHEST_PRIORITY, Tenant
from cluster.errors import AuthenticationError, ForbiddenError
from cluster.server.reloaded import LOOK_INTERVAL_S, Reloaded
from cluster.wire.auth import ALL_ROLES, Credential, Role, authorize, parse_credentials
from workers.errors import ConfigError

GENERATE, OPERATE = Role.GENERATE, Role.OPERATE


def test_a_file_has_tokens_with_roles_or_alone() -> None:
    text = "# clients\ngenerate one\n\n  operate  two \ngenerate,operate three\nfour\n"
    assert [(c.token, c.roles) for c in parse_credentials(text)] == [
        ("one", {GENERATE}), ("two", {OPERATE}), ("three", ALL_ROLES), ("four", ALL_ROLES),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none", "no token"),
        ("good\nadmin x", "line 2 has the role 'admin'; the roles are generate and operate"),
        ("generate a b", "line 1 has 3 words"),
        ("generate p\u00e4ss", "printable ASCII"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_credentials(text)


@pytest.mark.parametrize(
    ("given", "role", "error"),
    [
        ([], GENERATE, AuthenticationError),
        (["Bearer c"], GENERATE, AuthenticationError),
        (["a"], GENERATE, AuthenticationError),
        (["Bearer a", "Bearer a"], GENERATE, AuthenticationError),
        (["Bearer a"], OPERATE, ForbiddenError),
        (["Bearer b"], GENERATE, ForbiddenError),
    ],
)
def test_what_a_call_may_not_do(given: list[str], role: Role, error: type[Exception]) -> None:
    credentials = [Credential("a", frozenset({GENERATE})), Credential("b", frozenset({OPERATE}))]
    with pytest.raises(AuthenticationError) as caught:
        authorize(given, role, credentials)
    assert type(caught.value) is error
    authorize(["Bearer a"], GENERATE, credentials)
    authorize(["Bearer b"], OPERATE, credentials)
    authorize(["Bearer b"], None, credentials)


def test_files_are_read_when_they_change_and_once_in_a_while_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, time_s, reads = tmp_path / "file", 0.0, []

    def read() -> str:
        reads.append(path.read_text())
        if reads[-1] == "bad":
            raise ConfigError("it is bad")
        return reads[-1]

    path.write_text("one")
    content = Reloaded("the file", [str(path)], read, lambda: time_s)
    path.write_text("three")
    assert content() == "one"
    time_s += LOOK_INTERVAL_S
    assert (content(), content(), reads) == ("three", "three", ["one", "three"])
    path.write_text("bad")
    for _ in range(3):
        time_s += LOOK_INTERVAL_S
        assert content() == "three"
    assert [record.message for record in caplog.records].count(
        "the file changed and cannot be used, the one before stays: it is bad"
    ) == 1
    replaced = tmp_path / "new"
    replaced.write_text("good")
    replaced.rename(path)
    time_s += LOOK_INTERVAL_S
    assert content() == "good"


def test_a_token_may_be_a_tenants() -> None:
    text = "generate tenant=acme share=2.5 priority=-1:10 one\ntenant=ops two\ngenerate three\nfour\npriority=3 five\n"
    tenants = [credential.tenant for credential in parse_credentials(text)]
    assert tenants == [
        Tenant("acme", 2.5, (-1, 10)),
        Tenant("ops"),
        Tenant(priorities=(0, HIGHEST_PRIORITY)),
        Tenant(),
        Tenant(priorities=(3, 3)),
    ]
    assert authorize(["Bearer one"], GENERATE, parse_credentials(text)).name == "acme"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate tenent=a t", "line 1 has the setting 'tenent'"),
        ("share=0 t", r"share 0, it must be in \[0\.001, 1000\]"),
        ("share=nan t", "share nan"),
        ("share=much t", "line 1: share is a number"),
        ("priority=5:1 t", "priorities 5 to 1"),
        ("priority=a t", "line 1: share is a number, and priority the first and the last"),
    ],
)
def test_what_is_wrong_with_a_tenant_is_said(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_credentials(line)
