"""Run before MLflow's server starts: create the tables of its database, or bring them up to date.

MLflow reads the address of its user database only from a file. That file contains the database's password, so it is
written here, into a volume in memory.
"""

import configparser
import os
import sys

from mlflow.store.db import utils


def main() -> None:
    """Prepare the tables. Runs and users share one database; MLflow gives their tables different names."""
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    config = configparser.ConfigParser()
    config["mlflow"] = {"default_permission": "READ", "database_uri": uri.replace("%", "%%")}
    path = os.environ["MLFLOW_AUTH_CONFIG_PATH"]
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        config.write(file)

    from mlflow.server.auth.db.utils import migrate_if_needed  # reads that file

    engine = utils.create_sqlalchemy_engine_with_retry(uri)
    with engine.connect() as connection:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        sys.exit(f"error: the database's encoding is {encoding}, which cannot store Å; create it with ENCODING 'UTF8'")
    utils._safe_initialize_tables(engine)  # `mlflow db upgrade` cannot start from an empty database
    utils._upgrade_db(engine)
    migrate_if_needed(engine, "head")


if __name__ == "__main__":
    main()
