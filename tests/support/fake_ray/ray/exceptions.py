"""Ray's errors, as far as they are told apart."""


class RayError(Exception):
    """Base of all."""


class ActorDiedError(RayError):
    """An actor, or its node, has gone."""
