# To grade a class in a container: docs/teaching.md says how it is run.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap
COPY . /course
WORKDIR /course
RUN python -m pip install --no-cache-dir .
RUN useradd --create-home grader
USER grader
WORKDIR /home/grader
