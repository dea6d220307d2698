let calls = 0;

export const handler = async (event, context) => {
  calls += 1;
  console.log("called with", event);
  if (event.fail) {
    throw new TypeError(event.fail);
  }
  return {
    event,
    calls,
    request: context.awsRequestId,
    function: context.functionName,
    version: context.functionVersion,
    arn: context.invokedFunctionArn,
    memory: context.memoryLimitInMB,
    remaining: context.getRemainingTimeInMillis(),
    stream: process.env.AWS_LAMBDA_LOG_STREAM_NAME,
  };
};

export const streaming = awslambda.streamifyResponse(async (event, answer) => {
  for (let part = 0; part < event.parts; part += 1) {
    answer.write(`${part} `);
  }
  answer.end();
});
