"""Exceptions of other people's packages, known by name: none of these packages is imported for it.

A family is the top-level package that defines a type, as its `__module__` says; names, unlike submodules,
hardly ever move. A type is looked up by its own name, then by those of its ancestors, so the name of a base
class covers every class that nobody thought of.
"""

from __future__ import annotations

import msgspec

from glassbus.classification import codes
from glassbus.classification.verdicts import (
    ACCESS,
    CONNECTION,
    CORRUPT,
    EXHAUSTED,
    LIMITED,
    MISCONFIGURED,
    OVERFLOW,
    PROCESSING,
    TIMEOUT,
    UNREADABLE,
    Classification,
    Finding,
    Look,
)


class Family(msgspec.Struct, frozen=True):
    """`look` is asked first, about the exception itself; then `names`."""

    names: dict[str, Classification]
    look: Look | None = None


def _names(*entries: tuple[Classification, str]) -> dict[str, Classification]:
    return {name: verdict for verdict, names in entries for name in names.split()}


def _inner(*attributes: str) -> Look:
    """The exception that this one wraps, if it does."""

    def look(error: BaseException) -> Finding:
        for attribute in attributes:
            wrapped = getattr(error, attribute, None)
            if isinstance(wrapped, BaseException):
                return wrapped
        return None

    return look


def _either(*looks: Look) -> Look:
    def look(error: BaseException) -> Finding:
        for one in looks:
            found = one(error)
            if found is not None:
                return found
        return None

    return look


def _retried(error: BaseException) -> Finding:
    """tenacity: what the last attempt raised."""
    attempt = getattr(error, "last_attempt", None)
    raised = attempt.exception() if attempt is not None else None
    return raised if isinstance(raised, BaseException) else None


def _called_process(error: BaseException) -> Finding:
    """A program killed by SIGKILL was, nearly always, killed for its memory."""
    return LIMITED if getattr(error, "returncode", None) in (-9, 137) else None


_DATABASE = _names(
    (CONNECTION, "OperationalError InterfaceError DatabaseError Error"),
    (PROCESSING, "DataError IntegrityError ProgrammingError NotSupportedError InternalError"),
)
_SERIALIZERS = {
    name: Family(_names((UNREADABLE, words)))
    for name, words in {
        "_pickle": "PickleError",
        "pickle": "PickleError",
        "json": "JSONDecodeError",
        "orjson": "JSONDecodeError",
        "simplejson": "JSONDecodeError",
        "ujson": "JSONDecodeError",
        "struct": "error",
        "zlib": "error",
        "_lzma": "LZMAError",
        "gzip": "BadGzipFile",
        "zipfile": "BadZipFile LargeZipFile",
        "tarfile": "TarError",
        "binascii": "Error Incomplete",
        "_csv": "Error",
        "xml": "ParseError ExpatError SAXException DOMException",
        "lxml": "LxmlError",
        "plistlib": "InvalidFileException",
        "email": "MessageError",
        "xmlrpc": "ResponseError",
        "yaml": "YAMLError",
        "ruamel": "YAMLError",
        "msgpack": "UnpackException ExtraData FormatError StackError",
        "cbor2": "CBORError CBORDecodeError CBOREncodeError",
        "bson": "BSONError",
        "avro": "AvroException",
        "fastavro": "SchemaParseException UnknownType",
        "pydantic": "ValidationError",
        "pydantic_core": "ValidationError PydanticSerializationError",
        "jsonschema": "ValidationError",
        "marshmallow": "ValidationError",
        "pyarrow": "ArrowException ArrowInvalid",
    }.items()
}
_CONFIGURATION = {
    name: Family(_names((MISCONFIGURED, words)))
    for name, words in {
        "configparser": "Error",
        "tomllib": "TOMLDecodeError",
        "tomli": "TOMLDecodeError",
        "toml": "TomlDecodeError",
        "tomlkit": "TOMLKitError",
        "zoneinfo": "ZoneInfoNotFoundError",
        "argparse": "ArgumentError ArgumentTypeError",
        "getopt": "GetoptError",
        "pydantic_settings": "SettingsError",
        "django": "ImproperlyConfigured",
    }.items()
}

FAMILIES: dict[str, Family] = {
    **_SERIALIZERS,
    **_CONFIGURATION,
    # Stores
    "sqlite3": Family(_DATABASE, codes.by_sqlite),
    "apsw": Family(
        _names(
            (CONNECTION, "Error BusyError LockedError IOError ProtocolError ConnectionClosedError"),
            (CORRUPT, "CorruptError NotADBError"),
            (EXHAUSTED, "FullError NoMemError"),
            (LIMITED, "NoLFSError"),
            (ACCESS, "PermissionsError AuthError ReadOnlyError"),
            (MISCONFIGURED, "CantOpenError ExtensionLoadingError NoFTS5Error"),
            (TIMEOUT, "InterruptError"),
            (PROCESSING, "SQLError ConstraintError MismatchError MisuseError RangeError TooBigError SchemaChangeError"),
            (PROCESSING, "BindingsError IncompleteExecutionError ExecutionCompleteError CursorClosedError"),
            (PROCESSING, "ThreadingViolationError ForkingViolationError InvalidContextError FormatError NotFoundError"),
        )
    ),
    "psycopg": Family(_DATABASE, codes.by_sqlstate),
    "psycopg2": Family(_DATABASE, codes.by_sqlstate),
    "psycopg_pool": Family(_names((TIMEOUT, "PoolTimeout"), (OVERFLOW, "TooManyRequests"), (CONNECTION, "PoolClosed"))),
    "asyncpg": Family(_names((PROCESSING, "PostgresError InterfaceError")), codes.by_sqlstate),
    "pymysql": Family(_DATABASE, codes.by_mysql),
    "MySQLdb": Family(_DATABASE, codes.by_mysql),
    "asyncmy": Family(_DATABASE, codes.by_mysql),
    "mysql": Family(_DATABASE, codes.by_sqlstate),
    "sqlalchemy": Family(
        {
            **_DATABASE,
            **_names(
                (TIMEOUT, "TimeoutError"),
                (CONNECTION, "DisconnectionError ResourceClosedError"),
                (MISCONFIGURED, "ArgumentError NoDBAPILoaded NoSuchTableError UnboundExecutionError"),
                (PROCESSING, "SQLAlchemyError"),
            ),
        },
        _inner("orig"),
    ),
    "pymongo": Family(
        _names(
            (CONNECTION, "ConnectionFailure AutoReconnect"),
            (TIMEOUT, "ServerSelectionTimeoutError NetworkTimeout ExecutionTimeout"),
            (TIMEOUT, "WTimeoutError WaitQueueTimeoutError"),
            (MISCONFIGURED, "ConfigurationError"),
            (PROCESSING, "PyMongoError"),
        )
    ),
    "redis": Family(
        _names(
            (CONNECTION, "ConnectionError BusyLoadingError ClusterError ClusterDownError MasterDownError"),
            (TIMEOUT, "TimeoutError"),
            (ACCESS, "AuthenticationError AuthorizationError NoPermissionError AuthenticationWrongNumberOfArgsError"),
            (ACCESS, "ExternalAuthProviderError"),
            (EXHAUSTED, "OutOfMemoryError"),
            (LIMITED, "MaxConnectionsError"),
            (UNREADABLE, "DataError InvalidResponse"),
            (CONNECTION, "ReadOnlyError TryAgainError"),
            (PROCESSING, "RedisError ResponseError LockError"),
        )
    ),
    "elastic_transport": Family(
        _names((CONNECTION, "TransportError"), (TIMEOUT, "ConnectionTimeout"), (UNREADABLE, "SerializationError"))
    ),
    "elasticsearch": Family(_names((PROCESSING, "ApiError")), codes.by_status),
    # Brokers
    "nats": Family(
        _names(
            (CONNECTION, "Error NoServersError StaleConnectionError ConnectionClosedError ConnectionDrainingError"),
            (CONNECTION, "ConnectionReconnectingError NoRespondersError NoStreamResponseError ProtocolError"),
            (CONNECTION, "SecureConnFailedError ServiceUnavailableError ServerError"),
            (TIMEOUT, "TimeoutError"),
            (ACCESS, "AuthorizationError InvalidUserCredentialsError"),
            (OVERFLOW, "SlowConsumerError OutboundBufferLimitError TooManyStalledMsgsError"),
            (UNREADABLE, "MaxPayloadError JsonParseError BadHeaderError DigestMismatchError"),
            (MISCONFIGURED, "SecureConnRequiredError SecureConnWantedError ServerNotInPoolError BucketNotFoundError"),
            (PROCESSING, "BadSubjectError BadSubscriptionError BadTimeoutError InvalidCallbackTypeError"),
            (PROCESSING, "MsgAlreadyAckdError"),
            (PROCESSING, "NotJSMessageError APIError InvalidKeyError InvalidBucketNameError InvalidObjectNameError"),
            (PROCESSING, "ObjectAlreadyExists BadObjectMetaError LinkIsABucketError ConsumerSequenceMismatchError"),
        ),
        codes.by_jetstream,
    ),
    "aiormq": Family(
        _names(
            (CONNECTION, "AMQPError AMQPConnectionError AMQPChannelError ChannelInvalidStateError"),
            (ACCESS, "AuthenticationError ProbableAuthenticationError ChannelAccessRefused"),
            (MISCONFIGURED, "IncompatibleProtocolError ChannelNotFoundEntity ChannelPreconditionFailed"),
            (OVERFLOW, "PublishError DeliveryError"),
            (PROCESSING, "DuplicateConsumerTag MethodNotImplemented ChannelLockedResource"),
        )
    ),
    "aio_pika": Family(_names((PROCESSING, "MessageProcessError"))),
    "pamqp": Family(
        _names(
            (CONNECTION, "PAMQPException AMQPError AMQPConnectionForced"),
            (ACCESS, "AMQPAccessRefused AMQPNotAllowed"),
            (MISCONFIGURED, "AMQPNotFound AMQPPreconditionFailed AMQPInvalidPath AMQPNoRoute"),
            (LIMITED, "AMQPResourceError"),
            (UNREADABLE, "UnmarshalingException AMQPContentTooLarge"),
        )
    ),
    "pika": Family(
        _names(
            (CONNECTION, "AMQPError AMQPConnectionError AMQPChannelError"),
            (ACCESS, "AuthenticationError ProbableAuthenticationError ProbableAccessDeniedError"),
            (TIMEOUT, "AMQPHeartbeatTimeout ConnectionBlockedTimeout"),
            (LIMITED, "NoFreeChannels"),
            (OVERFLOW, "NackError"),
            (MISCONFIGURED, "UnroutableError IncompatibleProtocolError ProtocolVersionMismatch"),
            (UNREADABLE, "ShortStringTooLong UnsupportedAMQPFieldException InvalidFieldTypeException BodyTooLongError"),
        )
    ),
    **dict.fromkeys(
        ("kafka", "aiokafka"),
        Family(
            _names(
                (CONNECTION, "KafkaError"),
                (TIMEOUT, "KafkaTimeoutError RequestTimedOutError"),
                (ACCESS, "AuthenticationFailedError AuthenticationMethodNotSupported TopicAuthorizationFailedError"),
                (ACCESS, "GroupAuthorizationFailedError ClusterAuthorizationFailedError"),
                (ACCESS, "SaslAuthenticationFailed"),
                (OVERFLOW, "AsyncProducerQueueFull TooManyInFlightRequests"),
                (LIMITED, "QuotaViolationError"),
                (UNREADABLE, "MessageSizeTooLargeError UnsupportedCodecError CorruptRecordException"),
                (MISCONFIGURED, "KafkaConfigurationError IncompatibleBrokerVersion UnrecognizedBrokerVersion"),
                (PROCESSING, "IllegalStateError IllegalArgumentError CommitFailedError"),
            )
        ),
    ),
    "confluent_kafka": Family(_names((CONNECTION, "KafkaException"))),
    "websockets": Family(
        _names(
            (CONNECTION, "WebSocketException"),
            (MISCONFIGURED, "InvalidURI"),
            (UNREADABLE, "PayloadTooBig"),
            (PROCESSING, "ConcurrencyError"),
        ),
        codes.by_status,
    ),
    # HTTP and remote procedure calls
    "requests": Family(
        _names(
            (CONNECTION, "RequestException ConnectionError"),
            (TIMEOUT, "Timeout ConnectTimeout"),
            (UNREADABLE, "InvalidJSONError JSONDecodeError ContentDecodingError"),
            (MISCONFIGURED, "InvalidURL InvalidSchema MissingSchema URLRequired"),
            (PROCESSING, "HTTPError InvalidHeader TooManyRedirects StreamConsumedError UnrewindableBodyError"),
        ),
        codes.by_status,
    ),
    "urllib3": Family(
        _names(
            (CONNECTION, "HTTPError PoolError NewConnectionError"),
            (TIMEOUT, "TimeoutError"),
            (LIMITED, "EmptyPoolError FullPoolError"),
            (UNREADABLE, "DecodeError HeaderParsingError"),
            (MISCONFIGURED, "LocationValueError ProxySchemeUnsupported"),
            (PROCESSING, "InvalidHeader UnrewindableBodyError"),
        ),
        _inner("reason"),
    ),
    "httpx": Family(
        _names(
            (CONNECTION, "TransportError"),
            (TIMEOUT, "TimeoutException"),
            (UNREADABLE, "DecodingError"),
            (MISCONFIGURED, "InvalidURL UnsupportedProtocol"),
            (PROCESSING, "HTTPError StreamError LocalProtocolError"),
        ),
        codes.by_status,
    ),
    "httpcore": Family(_names((CONNECTION, "NetworkError ProtocolError ProxyError"), (TIMEOUT, "TimeoutException"))),
    "aiohttp": Family(
        _names(
            (CONNECTION, "ClientConnectionError ClientPayloadError WebSocketError"),
            (TIMEOUT, "ServerTimeoutError"),
            (ACCESS, "ClientConnectorCertificateError ServerFingerprintMismatch"),
            (UNREADABLE, "ContentTypeError"),
            (MISCONFIGURED, "InvalidURL NonHttpUrlClientError"),
            (PROCESSING, "ClientError"),
        ),
        codes.by_status,
    ),
    "urllib": Family(
        _names((CONNECTION, "URLError")),
        _either(codes.by_http_code, _inner("reason")),
    ),
    "http": Family(
        _names(
            (CONNECTION, "HTTPException"),
            (MISCONFIGURED, "InvalidURL UnknownProtocol"),
            (PROCESSING, "CookieError"),
        )
    ),
    "grpc": Family(
        _names((CONNECTION, "RpcError BaseError"), (TIMEOUT, "FutureTimeoutError FutureCancelledError")), codes.by_grpc
    ),
    "google": Family(
        _names(
            (UNREADABLE, "DecodeError EncodeError"),
            (ACCESS, "GoogleAuthError"),
            (CONNECTION, "GoogleAPIError"),
            (TIMEOUT, "RetryError"),
        ),
        codes.by_http_code,
    ),
    "botocore": Family(
        _names(
            (CONNECTION, "ConnectionError HTTPClientError"),
            (TIMEOUT, "ConnectTimeoutError ReadTimeoutError"),
            (ACCESS, "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError"),
            (ACCESS, "NoAuthTokenError SSOError LoginError"),
            (
                MISCONFIGURED,
                "NoRegionError BaseEndpointResolverError InvalidConfigError ProfileNotFound ConfigNotFound",
            ),
            (MISCONFIGURED, "ConfigParseError"),
            (PROCESSING, "BotoCoreError ClientError"),
        ),
        codes.by_aws,
    ),
    "jwt": Family(_names((ACCESS, "PyJWTError"), (CONNECTION, "PyJWKClientConnectionError"))),
    # The standard library
    "queue": Family(_names((OVERFLOW, "Full"))),
    "subprocess": Family(
        _names((TIMEOUT, "TimeoutExpired"), (PROCESSING, "SubprocessError")),
        _called_process,
    ),
    "concurrent": Family(_names((LIMITED, "BrokenExecutor"))),
    "multiprocessing": Family(
        _names((ACCESS, "AuthenticationError"), (TIMEOUT, "TimeoutError"), (PROCESSING, "ProcessError"))
    ),
    "smtplib": Family(
        _names(
            (CONNECTION, "SMTPException"),
            (ACCESS, "SMTPAuthenticationError"),
            (PROCESSING, "SMTPRecipientsRefused SMTPSenderRefused SMTPDataError SMTPNotSupportedError"),
        )
    ),
    "ftplib": Family(_names((CONNECTION, "Error"))),
    "imaplib": Family(_names((CONNECTION, "error"))),
    # Wrappers
    "tenacity": Family({}, _retried),
}
