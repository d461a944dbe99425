"""Carries Falco alerts to AWS: receiver, durable spool, delivery to CloudWatch Logs and Security Hub."""

__version__ = "0.1.0"
