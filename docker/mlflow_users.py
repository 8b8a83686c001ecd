"""Create a user of the local MLflow server, or change its password: ``mlflow_users.py NAME < password``."""

import os
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient


def main() -> None:
    """Act as the administrator, whose password is in the environment."""
    os.environ["MLFLOW_TRACKING_USERNAME"] = os.environ["MLFLOW_AUTH_ADMIN_USERNAME"]
    os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    name, password = sys.argv[1], sys.stdin.read().strip()
    client = AuthServiceClient("http://localhost:5000")
    try:
        client.create_user(name, password)
    except MlflowException as why:
        if why.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)
    print(f"{name}: can log in")


if __name__ == "__main__":
    main()
