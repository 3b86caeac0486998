import pytest

from hypervisor.core.errors import Unauthenticated
from hypervisor.server.auth import AnonymousAuthenticator, CertificateAuthenticator, TokenAuthenticator

TOKENS = {"ann": "0123456789abcdef", "bob": "fedcba9876543210"}


class Given:
    """Credentials of a test."""

    def __init__(self, authorization: str | None = None, certificate: str | None = None) -> None:
        self._authorization = authorization
        self._certificate = certificate

    def header(self, name: str) -> str | None:
        return self._authorization if name == "authorization" else None

    def certificate_name(self) -> str | None:
        return self._certificate


def test_anonymous_lets_everybody_in() -> None:
    assert AnonymousAuthenticator().authenticate(Given()).name == "anonymous"


@pytest.mark.parametrize(("token", "name"), [("0123456789abcdef", "ann"), ("fedcba9876543210", "bob")])
def test_a_token_names_its_caller(token: str, name: str) -> None:
    assert TokenAuthenticator(TOKENS).authenticate(Given(f"Bearer {token}")).name == name
    assert TokenAuthenticator(TOKENS).authenticate(Given(f"bearer  {token}")).name == name


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "TOKEN_MISSING"),
        ("", "TOKEN_MALFORMED"),
        ("Bearer", "TOKEN_MALFORMED"),
        ("Bearer ", "TOKEN_MALFORMED"),
        ("Basic 0123456789abcdef", "TOKEN_MALFORMED"),
        ("Bearer 0123456789abcdeg", "TOKEN_UNKNOWN"),
        ("Bearer " + "x" * 100_000, "TOKEN_UNKNOWN"),
    ],
)
def test_no_or_a_wrong_token_is_refused_without_being_repeated(header: str | None, reason: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        TokenAuthenticator(TOKENS).authenticate(Given(header))

    assert refused.value.reason == reason
    assert "0123456789abcde" not in refused.value.message


def test_a_certificate_names_its_caller() -> None:
    assert CertificateAuthenticator().authenticate(Given(certificate="ann")).name == "ann"


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_certificate_nobody_is_known(name: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        CertificateAuthenticator().authenticate(Given(certificate=name))

    assert refused.value.reason == "CERTIFICATE_MISSING"
